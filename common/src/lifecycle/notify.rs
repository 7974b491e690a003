//! Talking to the service manager: the protocol of `sd_notify(3)`.
//!
//! The messages are the `sd-notify` crate's; the socket is opened here, because that crate reads the process's environment
//! at each call and a test could not give it another.

use std::{
    io,
    os::{
        linux::net::SocketAddrExt as _,
        unix::net::{SocketAddr, UnixDatagram},
    },
    time::Duration,
};

use sd_notify::NotifyState;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

/// The way to the service manager; silent where there is none.
#[derive(Debug)]
pub struct Notifier {
    socket: Option<UnixDatagram>,
    watchdog: Option<Duration>,
}

impl Notifier {
    /// Reads `NOTIFY_SOCKET`, `WATCHDOG_USEC` and `WATCHDOG_PID` from this process's environment.
    ///
    /// # Errors
    /// If the socket is named and cannot be reached.
    pub fn from_process() -> io::Result<Self> {
        Self::from_environment(|name| std::env::var(name).ok())
    }

    /// The same with a given environment.
    ///
    /// # Errors
    /// As for [`Self::from_process`].
    pub fn from_environment(variable: impl Fn(&str) -> Option<String>) -> io::Result<Self> {
        let socket = match variable("NOTIFY_SOCKET") {
            Some(path) if !path.is_empty() => Some(connect(&path)?),
            _ => None,
        };
        let meant_for_us = variable("WATCHDOG_PID")
            .is_none_or(|process| process.parse() == Ok(std::process::id()));
        let watchdog = variable("WATCHDOG_USEC")
            .and_then(|micros| micros.parse().ok())
            .filter(|micros| *micros > 0 && meant_for_us && socket.is_some())
            .map(Duration::from_micros);
        Ok(Self { socket, watchdog })
    }

    /// Whether a service manager listens.
    pub fn is_connected(&self) -> bool {
        self.socket.is_some()
    }

    /// The service takes calls.
    pub fn ready(&self) {
        self.send(&[NotifyState::Ready]);
    }

    /// The service is stopping.
    pub fn stopping(&self) {
        self.send(&[NotifyState::Stopping]);
    }

    /// The service reads its configuration anew; [`Self::ready`] follows when it is done.
    pub fn reloading(&self) {
        match NotifyState::monotonic_usec_now() {
            Ok(now) => self.send(&[NotifyState::Reloading, now]),
            Err(error) => tracing::warn!(%error, "cannot read the monotonic clock"),
        }
    }

    /// One line for `systemctl status`.
    pub fn status(&self, line: &str) {
        // A line break would begin another field of the message.
        let line = line.replace(['\n', '\r'], " ");
        self.send(&[NotifyState::Status(&line)]);
    }

    /// The longest silence that the service manager allows, if it watches.
    pub fn watchdog_interval(&self) -> Option<Duration> {
        self.watchdog
    }

    /// Pings the service manager twice in each watchdog interval for as long as `alive` says yes, until `stop`. While it
    /// says no nothing is sent, and the service manager ends the process when the interval is over. Returns at once if
    /// nobody watches.
    pub async fn watchdog(&self, alive: impl Fn() -> bool + Send, stop: CancellationToken) {
        let Some(interval) = self.watchdog else {
            return;
        };
        let mut ticks = tokio::time::interval(interval / 2);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut was_alive = true;
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = ticks.tick() => {}
            }
            let is_alive = alive();
            if is_alive {
                self.send(&[NotifyState::Watchdog]);
            } else if was_alive {
                tracing::error!("the service is not healthy; watchdog pings are withheld");
            }
            was_alive = is_alive;
        }
    }

    fn send(&self, states: &[NotifyState<'_>]) {
        let Some(socket) = &self.socket else {
            return;
        };
        let lines: Vec<_> = states.iter().map(ToString::to_string).collect();
        let message = lines.join("\n") + "\n";
        // A service manager that does not listen must not stop the service.
        if let Err(error) = socket.send(message.as_bytes()) {
            tracing::warn!(%error, "cannot notify the service manager");
        }
    }
}

/// `path` is a file, or an abstract name written with `@` in front.
fn connect(path: &str) -> io::Result<UnixDatagram> {
    let address = match path.strip_prefix('@') {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(path)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}
