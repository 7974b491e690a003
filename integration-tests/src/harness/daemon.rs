//! A silo with a real daemon: its data, its configuration and its process, on a tiny random backbone.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use concord_common::{Role, config::TlsSection, seed::Seed};

use super::{Federation, PATIENCE, Program};

/// The committed BERT of two layers and width 24 that daemons train on; its vocabulary is little more than letters.
pub fn tiny_backbone() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../common/learning/fixtures/bert")
}

/// A silo's task: made-up rows whose class depends on a word.
#[derive(Debug, Clone)]
pub struct Task {
    /// One word for each class; a row has one of them between other words.
    pub words: Vec<&'static str>,
    /// Names of the classes.
    pub labels: Vec<&'static str>,
    /// Put into every text, also in two-text rows.
    pub mark: &'static str,
    /// Two texts a row.
    pub pair: bool,
    /// Training rows.
    pub rows: usize,
}

/// A daemon's files and, while it runs, its process.
#[derive(Debug)]
pub struct Daemon {
    // Before the rest, so that the process is gone first.
    program: Option<Program>,
    name: String,
    folder: PathBuf,
}

impl Daemon {
    /// Writes data, certificate and configuration of the silo `name`, whose server is at `address`. Nothing is started.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn new(
        federation: &Federation,
        name: &str,
        address: &str,
        task: &Task,
    ) -> anyhow::Result<Self> {
        let folder = federation.path().join(name);
        fs::create_dir(&folder)?;
        for (split, rows) in [("train", task.rows), ("validation", 12), ("test", 12)] {
            let text = csv(task, rows, Seed(11).derive(name).derive(split));
            fs::write(folder.join(format!("{split}.csv")), text)?;
        }
        let tls = federation.issue(Role::Silo, name)?;
        let daemon = Self {
            program: None,
            name: name.to_owned(),
            folder,
        };
        fs::write(daemon.config(), client_config(address, &tls, task))?;
        Ok(daemon)
    }

    /// The silo's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The silo's folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Its configuration file.
    pub fn config(&self) -> PathBuf {
        self.folder.join("client.toml")
    }

    /// Starts the daemon and waits until it says that it runs; it need not have reached its server.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn start(&mut self, environment: &[(&str, &str)]) -> anyhow::Result<()> {
        let arguments = ["run", "--config", "client.toml"];
        let mut program = Program::start(
            "concord-client",
            "daemon",
            &self.folder,
            &arguments,
            environment,
        )?;
        program.wait_for_log("running daemon", PATIENCE, |log| {
            log.contains("\"message\":\"running\"").then_some(())
        })?;
        self.program = Some(program);
        Ok(())
    }

    /// The running daemon.
    ///
    /// # Errors
    /// If it was not started.
    pub fn program(&mut self) -> anyhow::Result<&mut Program> {
        self.program.as_mut().context("the daemon was not started")
    }

    /// Ends the daemon with SIGKILL.
    ///
    /// # Errors
    /// If it was not started.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        let mut program = self.program.take().context("the daemon was not started")?;
        program.kill()
    }
}

/// Rows of a task as a CSV file.
fn csv(task: &Task, rows: usize, seed: Seed) -> String {
    const FILLERS: [&str; 8] = ["of", "to", "the", "and", "at", "an", "bo", "ni"];
    let mut rng = seed.rng();
    let mut text = String::from(if task.pair {
        "text_a,text_b,label\n"
    } else {
        "text,label\n"
    });
    for row in 0..rows {
        // Every class comes up, whatever the seed.
        let class = row % task.words.len();
        let mut filler = || FILLERS[rng.below(FILLERS.len() as u64) as usize];
        let (word, label, mark) = (task.words[class], task.labels[class], task.mark);
        let first = format!("{} {word} {} {mark}", filler(), filler());
        let line = if task.pair {
            format!("{first},{} {mark} {},{label}", filler(), filler())
        } else {
            format!("{first},{label}")
        };
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{line}");
    }
    text
}

/// The text of a `client.toml`; all paths but the certificates' are in its own folder.
fn client_config(address: &str, tls: &TlsSection, task: &Task) -> String {
    let (kind, columns) = if task.pair {
        (
            "pair",
            "{ text = \"text_a\", text_b = \"text_b\", label = \"label\" }",
        )
    } else {
        ("single", "{ text = \"text\", label = \"label\" }")
    };
    format!(
        r#"[server]
address = "{address}"
poll_interval = "1s"
max_backoff = "500ms"

[tls]
certificate = "{certificate}"
key = "{key}"
ca = "{ca}"

[state]
folder = "state"

[log]
format = "json"
filter = "info"

[[backbone]]
name = "tiny"
path = "{backbone}"

[[task]]
name = "test"
kind = "{kind}"
format = "csv"
columns = {columns}
train = "train.csv"
validation = "validation.csv"
test = "test.csv"
"#,
        certificate = tls.certificate.display(),
        key = tls.key.display(),
        ca = tls.ca.display(),
        backbone = tiny_backbone().display(),
    )
}
