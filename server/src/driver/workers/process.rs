//! A worker as a child of the server, in a process group of its own so that nothing of it is left over.

use std::{
    io,
    os::unix::process::CommandExt as _,
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use concord_common::config::ENVIRONMENT_PREFIX;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};
use tokio_util::sync::CancellationToken;

use crate::config::WorkerCommand;

/// How often the child is looked at. A signal handler for the ends of children would tell it at once, and nobody is in a hurry.
const LOOK: Duration = Duration::from_millis(100);

/// What the service manager tells the server alone.
const OWN_VARIABLES: [&str; 3] = ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"];

/// A running worker; dropped, it is killed with all that it has started.
#[derive(Debug)]
pub(super) struct Process {
    child: Child,
    /// Its process group; none once it was waited for, after which the number may be another's.
    group: Option<Pid>,
}

impl Process {
    /// Starts `program run --config FILE --exit-when-idle 30s`, whose stop is to take `stop_within` at most. What it writes goes where
    /// the server's own goes.
    ///
    /// # Errors
    /// If it cannot be started.
    pub(super) fn start(command: &WorkerCommand, stop_within: Duration) -> io::Result<Self> {
        let mut starting = Command::new(&command.program);
        starting
            .arg("run")
            .arg("--config")
            .arg(&command.config)
            .args(["--exit-when-idle", "30s"])
            .stdin(Stdio::null())
            .process_group(0);
        // The worker reads variables of the same form, and these are about the server.
        for (name, _) in std::env::vars_os() {
            let is_setting = name
                .to_str()
                .is_some_and(|name| name.starts_with(ENVIRONMENT_PREFIX));
            if is_setting {
                starting.env_remove(name);
            }
        }
        for name in OWN_VARIABLES {
            starting.env_remove(name);
        }
        starting.env(
            format!("{ENVIRONMENT_PREFIX}LIMITS__STOP_WITHIN"),
            format!("{}ms", stop_within.as_millis()),
        );
        let child = starting.spawn()?;
        let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        Ok(Self { child, group })
    }

    /// Its process id.
    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits for its end. What it has started and left behind is killed.
    ///
    /// # Errors
    /// If the system does not tell how it ended.
    pub(super) async fn ended(&mut self) -> io::Result<ExitStatus> {
        while let Some(group) = self.group {
            // Without taking its end: as long as that is not taken, the number is the group's.
            let look = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
            if let Ok(None) = waitid(WaitId::Pid(group), look) {
                tokio::time::sleep(LOOK).await;
                continue;
            }
            self.signal(Signal::KILL);
            self.group = None;
        }
        self.child.wait()
    }

    /// Asks it to stop, and kills it if it has not after `grace` or as soon as `at_once` is cancelled.
    ///
    /// # Errors
    /// As [`Process::ended`].
    pub(super) async fn stop(
        &mut self,
        grace: Duration,
        at_once: CancellationToken,
    ) -> io::Result<ExitStatus> {
        self.signal(Signal::TERM);
        tokio::select! {
            ended = self.ended() => return ended,
            () = tokio::time::sleep(grace) => {}
            () = at_once.cancelled() => {}
        }
        tracing::warn!(
            process = self.id(),
            "the worker did not stop in time; killing it"
        );
        self.signal(Signal::KILL);
        self.ended().await
    }

    fn signal(&self, signal: Signal) {
        let Some(group) = self.group else {
            return;
        };
        match kill_process_group(group, signal) {
            // Everybody in it is gone already.
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(error) => {
                tracing::warn!(process = self.id(), %error, "cannot send a signal to the worker");
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.group.is_some() {
            self.signal(Signal::KILL);
            // Not left behind as a zombie if it is quick; the end of the server takes it in any case.
            let _ = self.child.try_wait();
        }
    }
}
