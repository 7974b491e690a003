//! `concord-client simulate`: a federation in one process.

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
};

use concord_common::{
    SiloId,
    config::{ByteSize, LogSection},
    fsutil,
    job::JobSpec,
    lifecycle::wait_for_signal,
    telemetry::init_logging,
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use super::CommandError;
use crate::simulate::{
    Plan, SilosError, SimulateError, SimulatedSilos, SimulationReport, Simulator,
};

/// What to simulate.
#[derive(Debug, clap::Args)]
pub struct SimulateArgs {
    /// The job's specification; several are run one after the other over the same rows.
    #[arg(long = "job", required = true, value_name = "FILE")]
    jobs: Vec<PathBuf>,
    /// A silos.toml, or a folder with tasks.json and a folder of CSV files for each task.
    #[arg(long, value_name = "PATH", required_unless_present = "silo")]
    silos: Option<PathBuf>,
    /// A silo with its daemon's configuration; may be given several times.
    #[arg(long, value_name = "NAME=CONFIG", value_parser = pair::<SiloId>, conflicts_with = "silos")]
    silo: Vec<(SiloId, PathBuf)>,
    /// A backbone's folder, in place of or beside those of the silos' file.
    #[arg(long = "backbone", value_name = "NAME=FOLDER", value_parser = pair::<String>)]
    backbones: Vec<(String, PathBuf)>,
    /// An algorithm in place of the job's, with its default settings.
    #[arg(long)]
    algorithm: Option<String>,
    /// A seed in place of the job's.
    #[arg(long)]
    seed: Option<u64>,
    /// Threads of one libtorch operation, in place of the silos' setting.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
    /// Memory for the prefix caches of all silos together, such as `1 GiB`, in place of the silos' setting. It changes no result.
    #[arg(long, value_name = "SIZE")]
    cache: Option<ByteSize>,
    /// Writes the report as JSON to standard output.
    #[arg(long)]
    json: bool,
    /// Writes the report as JSON to a file.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Keeps vaults and egress logs in this folder; a temporary one otherwise.
    #[arg(long, value_name = "FOLDER")]
    state: Option<PathBuf>,
    /// What is logged, in the form of RUST_LOG.
    #[arg(long, default_value = "warn")]
    log: String,
}

fn pair<T: std::str::FromStr>(text: &str) -> Result<(T, PathBuf), String>
where
    T::Err: std::fmt::Display,
{
    let (name, path) = text.split_once('=').ok_or("write it as NAME=PATH")?;
    let name = name.parse().map_err(|error: T::Err| error.to_string())?;
    Ok((name, path.into()))
}

/// Runs the jobs and prints a table, or JSON: an object for one job, an array for several.
///
/// # Errors
/// If a file cannot be used, or a job cannot be run to its end.
pub async fn simulate(
    args: &SimulateArgs,
    out: &mut (dyn Write + Send),
) -> Result<(), CommandError> {
    init_logging(&LogSection {
        filter: args.log.clone(),
        ..LogSection::default()
    })?;
    if let Some(folder) = args.out.as_deref().and_then(Path::parent)
        && !folder.as_os_str().is_empty()
        && !folder.is_dir()
    {
        // Said before the work, not after it.
        return Err(CommandError::io(
            folder,
            io::Error::new(io::ErrorKind::NotFound, "there is no such folder"),
        ));
    }
    let specs = args
        .jobs
        .iter()
        .map(|path| read_spec(path))
        .collect::<Result<Vec<String>, _>>()?;
    let silos = silos(args, &specs)?;
    let temporary;
    let folder: &Path = if let Some(folder) = &args.state {
        folder
    } else {
        temporary =
            tempfile::tempdir().map_err(|error| CommandError::io("temporary folder", error))?;
        temporary.path()
    };
    let stop = CancellationToken::new();
    let _listening = stop_on_signal(stop.clone());
    let simulator = Simulator::start(silos, folder, stop).map_err(Box::new)?;
    let mut reports = Vec::new();
    for (number, spec_toml) in specs.into_iter().enumerate() {
        let plan = Plan {
            spec_toml,
            algorithm: args.algorithm.clone(),
            seed: args.seed,
        };
        let report = simulator
            .run(&plan, number + 1, |told| {
                tracing::info!(silo.id = %told.silo, round = told.round, rounds = told.rounds, "round done");
            })
            .await
            .map_err(Box::new)?;
        reports.push(report);
    }
    write_reports(args, &reports, out)
}

/// A job's specification, if it is one.
fn read_spec(path: &Path) -> Result<String, CommandError> {
    let text = fs::read_to_string(path).map_err(|error| CommandError::io(path, error))?;
    match JobSpec::parse(&text) {
        Ok(_) => Ok(text),
        Err(refusal) => Err(CommandError::Spec {
            path: path.to_owned(),
            refusal,
        }),
    }
}

fn silos(args: &SimulateArgs, specs: &[String]) -> Result<SimulatedSilos, CommandError> {
    let mut silos = if let Some(path) = &args.silos {
        SimulatedSilos::read(path)?
    } else {
        let first =
            JobSpec::parse(&specs[0]).map_err(|refusal| Box::new(SimulateError::Spec(refusal)))?;
        SimulatedSilos::from_daemons(&args.silo, &first.training().task)?
    };
    if silos.tasks.is_empty() {
        return Err(CommandError::Silos(SilosError::Content {
            path: args.silos.clone().unwrap_or_default(),
            reason: "it lists no silo".to_owned(),
        }));
    }
    for (name, path) in &args.backbones {
        silos.add_backbone(name, path);
    }
    if let Some(threads) = args.threads {
        silos.threads = usize::from(threads);
    }
    if let Some(size) = args.cache {
        silos.cache.memory_bytes = size.bytes();
    }
    Ok(silos)
}

/// Ends the simulation between two training steps on SIGTERM or SIGINT.
#[expect(
    clippy::disallowed_methods,
    reason = "the task ends with its handle, which the caller holds"
)]
fn stop_on_signal(stop: CancellationToken) -> AbortOnDropHandle<()> {
    AbortOnDropHandle::new(tokio::spawn(async move {
        match wait_for_signal().await {
            Ok(_) => stop.cancel(),
            Err(error) => tracing::warn!(%error, "cannot listen for signals"),
        }
    }))
}

fn write_reports(
    args: &SimulateArgs,
    reports: &[SimulationReport],
    out: &mut (dyn Write + Send),
) -> Result<(), CommandError> {
    let json = match reports {
        [one] => serde_json::to_vec_pretty(one),
        several => serde_json::to_vec_pretty(several),
    }
    .map_err(|error| CommandError::Output(error.into()))?;
    if let Some(path) = &args.out {
        fsutil::write_atomic(path, &json, 0o644).map_err(|error| CommandError::io(path, error))?;
    }
    if args.json {
        out.write_all(&json).map_err(CommandError::Output)?;
        return out.write_all(b"\n").map_err(CommandError::Output);
    }
    for report in reports {
        out.write_all(table(report).as_bytes())
            .map_err(CommandError::Output)?;
    }
    Ok(())
}

fn table(report: &SimulationReport) -> String {
    let mut text = format!(
        "{} ({}, seed {}): {} after {:.1} s{}\n{:<24} {:>8} {:>9} {:>9} {:>9} {:>10}\n",
        report.job,
        report.algorithm,
        report.seed,
        report.state,
        report.seconds,
        if report.reason.is_empty() {
            String::new()
        } else {
            format!(": {}", report.reason)
        },
        "silo",
        "rows",
        "majority",
        "best test",
        "last test",
        "best round",
    );
    let number =
        |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.3}"));
    for silo in &report.silos {
        let of = |metrics: &std::collections::BTreeMap<String, f64>| {
            number(
                metrics
                    .get("accuracy")
                    .or_else(|| metrics.get("spearman"))
                    .copied(),
            )
        };
        let row = format!(
            "{:<24} {:>8} {:>9} {:>9} {:>9} {:>10}\n",
            silo.silo_id.as_str(),
            silo.examples,
            number(silo.majority),
            of(&silo.best_test),
            of(&silo.last_test),
            silo.best_round
                .map_or_else(|| "-".to_owned(), |round| round.to_string()),
        );
        text.push_str(&row);
    }
    if !report.left_out.is_empty() {
        let names: Vec<&str> = report.left_out.iter().map(SiloId::as_str).collect();
        let names = names.join(", ");
        text.extend(["left out, as the job does not name them: ", &names, "\n"]);
    }
    text
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: SimulateArgs,
    }

    #[test]
    fn threads_and_cache_of_the_command_line_go_before_those_of_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("silos.toml");
        fs::write(
            &file,
            "torch.threads = 3\ncache.memory = \"5 MiB\"\n[[silo]]\nid = \"north\"\ntask = { format = \"csv\", file = \"rows.csv\", split = { seed = 0 } }\n",
        )
        .unwrap();
        let read = |more: &[&str]| {
            let file = file.to_str().unwrap();
            let words = ["simulate", "--job", "job.toml", "--silos", file];
            let line = Line::try_parse_from(words.iter().chain(more)).unwrap();
            let silos = silos(&line.args, &[]).unwrap();
            (silos.threads, silos.cache.memory_bytes)
        };
        assert_eq!(read(&[]), (3, 5 << 20));
        assert_eq!(read(&["--cache", "7 MiB"]), (3, 7 << 20));
        assert_eq!(read(&["--threads", "2", "--cache=1GiB"]), (2, 1 << 30));
    }
}
