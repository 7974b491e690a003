//! One program as a child process. It dies with its handle.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::Write as _,
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use anyhow::{Context as _, bail};

use super::{program_path, wait_for};

/// A running program. What it writes goes to a file; dropping the handle kills it.
#[derive(Debug)]
pub struct Program {
    name: String,
    child: Child,
    log: PathBuf,
    /// Length of the log when this run began.
    earlier: usize,
}

impl Program {
    /// Starts a program in `folder`. Its output is added to `<log name>.log` there, so a restart goes on in the same file.
    ///
    /// # Errors
    /// If it was not built or cannot be started.
    pub fn start<A: AsRef<OsStr>>(
        name: &str,
        log_name: &str,
        folder: &Path,
        arguments: &[A],
        environment: &[(&str, &str)],
    ) -> anyhow::Result<Self> {
        let log = folder.join(format!("{log_name}.log"));
        let file = File::options()
            .create(true)
            .append(true)
            .open(&log)
            .with_context(|| format!("cannot open {}", log.display()))?;
        let earlier = file.metadata()?.len() as usize;
        let child = Command::new(program_path(name)?)
            .args(arguments)
            .envs(environment.iter().copied())
            .current_dir(folder)
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        Ok(Self {
            name: log_name.to_owned(),
            child,
            log,
            earlier,
        })
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Everything it has written so far, without earlier runs.
    pub fn log(&self) -> String {
        let bytes = fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(bytes.get(self.earlier..).unwrap_or_default()).into_owned()
    }

    /// Waits until what it has written satisfies `wanted`.
    ///
    /// # Errors
    /// If it does not within `within`, or the program ends before; the error holds the end of the log.
    pub fn wait_for_log<T>(
        &mut self,
        what: &str,
        within: Duration,
        mut wanted: impl FnMut(&str) -> Option<T>,
    ) -> anyhow::Result<T> {
        let result = wait_for(what, within, || {
            let ended = self.child.try_wait()?;
            match (wanted(&self.log()), ended) {
                (Some(found), _) => Ok(Some(found)),
                (None, Some(status)) => bail!("{} ended ({status})", self.name),
                (None, None) => Ok(None),
            }
        });
        result.with_context(|| self.tail())
    }

    /// Sends a signal by its name (`TERM`, `KILL`, `HUP`).
    ///
    /// # Errors
    /// If the process is gone.
    pub fn signal(&self, name: &str) -> anyhow::Result<()> {
        let status = Command::new("kill")
            .args([format!("-{name}"), self.pid().to_string()])
            .stderr(Stdio::null())
            .status()
            .context("cannot run `kill`")?;
        if !status.success() {
            bail!("cannot send SIG{name} to {}: it is gone", self.name);
        }
        Ok(())
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// If it goes on for longer than `within`.
    pub fn wait(&mut self, within: Duration) -> anyhow::Result<ExitStatus> {
        let result = wait_for("end of the program", within, || {
            Ok(self.child.try_wait()?)
        });
        result.with_context(|| self.tail())
    }

    /// SIGTERM, and waits for its end.
    ///
    /// # Errors
    /// As [`Program::signal`] and [`Program::wait`].
    pub fn terminate(&mut self, within: Duration) -> anyhow::Result<ExitStatus> {
        self.signal("TERM")?;
        self.wait(within)
    }

    /// SIGKILL, as a power cut would end it.
    ///
    /// # Errors
    /// If the process is gone already.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// True while it runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Name and the last lines of the log, for error messages.
    fn tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        let last = lines[lines.len().saturating_sub(25)..].join("\n");
        format!(
            "{} (process {}); the end of its log:\n{last}",
            self.name,
            self.pid()
        )
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // Errors mean that it is gone, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a program that ran to its end did.
#[derive(Debug, Clone)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Output {
    /// The exit code, or 128 plus the signal as shells count.
    pub fn code(&self) -> i32 {
        self.status
            .code()
            .or_else(|| self.status.signal().map(|signal| 128 + signal))
            .unwrap_or(-1)
    }

    /// Standard output of a program that succeeded.
    ///
    /// # Errors
    /// If it failed; the error holds what it wrote.
    pub fn success(self) -> anyhow::Result<String> {
        if self.status.success() {
            return Ok(self.stdout);
        }
        bail!("exit code {}: {}{}", self.code(), self.stdout, self.stderr)
    }
}

/// Runs a program in `folder` to its end.
///
/// # Errors
/// If it was not built or cannot be started; a failure of the program is in the result.
pub fn run<A: AsRef<OsStr>>(name: &str, folder: &Path, arguments: &[A]) -> anyhow::Result<Output> {
    run_with_input(name, folder, arguments, b"")
}

/// Runs a program in `folder` to its end, with `input` on its standard input.
///
/// # Errors
/// As [`run`].
pub fn run_with_input<A: AsRef<OsStr>>(
    name: &str,
    folder: &Path,
    arguments: &[A],
    input: &[u8],
) -> anyhow::Result<Output> {
    let mut child = Command::new(program_path(name)?)
        .args(arguments)
        .current_dir(folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {name}"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that does not read its input may be gone by now.
        let _ = stdin.write_all(input);
    }
    let output = child.wait_with_output()?;
    Ok(Output {
        status: output.status,
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}
