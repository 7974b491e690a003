use std::{
    future::pending,
    io::ErrorKind,
    os::unix::net::UnixDatagram,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use futures::StreamExt as _;
use tokio::time::Instant;

use super::*;

/// A service manager: a datagram socket in a folder of its own.
struct Manager {
    socket: UnixDatagram,
    path: PathBuf,
    _folder: tempfile::TempDir,
}

impl Manager {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_nonblocking(true).unwrap();
        Self {
            socket,
            path,
            _folder: folder,
        }
    }

    fn notifier(&self, more: &[(&str, &str)]) -> Notifier {
        let path = self.path.to_str().unwrap().to_owned();
        let mut variables = vec![("NOTIFY_SOCKET", path.as_str())];
        variables.extend_from_slice(more);
        Notifier::from_environment(|name| {
            let found = variables.iter().find(|(known, _)| *known == name)?;
            Some(found.1.to_owned())
        })
        .unwrap()
    }

    /// Every message that has come in, in order.
    fn messages(&self) -> Vec<String> {
        let mut messages = Vec::new();
        let mut buffer = [0; 512];
        loop {
            match self.socket.recv(&mut buffer) {
                Ok(count) => messages.push(String::from_utf8(buffer[..count].to_vec()).unwrap()),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return messages,
                Err(error) => panic!("{error}"),
            }
        }
    }
}

#[test]
fn the_service_manager_hears_of_every_stage() {
    let manager = Manager::new();
    let notifier = manager.notifier(&[]);
    notifier.status("reading\nREADY=1");
    notifier.ready();
    notifier.reloading();
    notifier.stopping();
    let messages = manager.messages();
    assert_eq!(messages[0], "STATUS=reading READY=1\n");
    assert_eq!(messages[1], "READY=1\n");
    assert!(
        messages[2].starts_with("RELOADING=1\nMONOTONIC_USEC="),
        "{}",
        messages[2]
    );
    assert_eq!(messages[3], "STOPPING=1\n");
    assert_eq!(messages.len(), 4);
}

#[test]
fn without_a_service_manager_nothing_is_sent_and_nothing_fails() {
    let notifier = Notifier::from_environment(|_| None).unwrap();
    assert!(!notifier.is_connected());
    notifier.ready();
    assert_eq!(notifier.watchdog_interval(), None);
}

#[test]
fn a_service_manager_that_cannot_be_reached_is_an_error() {
    let result = Notifier::from_environment(|name| {
        (name == "NOTIFY_SOCKET").then(|| "/nowhere/notify".to_owned())
    });
    assert!(result.is_err());
}

#[test]
fn a_service_manager_with_an_abstract_name_is_found() {
    use std::os::linux::net::SocketAddrExt as _;

    let name = format!("concord-notify-test-{}", std::process::id());
    let address = std::os::unix::net::SocketAddr::from_abstract_name(&name).unwrap();
    let socket = UnixDatagram::bind_addr(&address).unwrap();
    let notifier = Notifier::from_environment(|variable| {
        (variable == "NOTIFY_SOCKET").then(|| format!("@{name}"))
    })
    .unwrap();
    notifier.ready();
    let mut buffer = [0; 64];
    let count = socket.recv(&mut buffer).unwrap();
    assert_eq!(&buffer[..count], b"READY=1\n");
}

#[test]
fn a_watchdog_meant_for_another_process_is_not_ours() {
    let manager = Manager::new();
    let ours = std::process::id().to_string();
    let interval = |process: &str| {
        manager
            .notifier(&[("WATCHDOG_USEC", "10000000"), ("WATCHDOG_PID", process)])
            .watchdog_interval()
    };
    assert_eq!(interval(&ours), Some(Duration::from_secs(10)));
    assert_eq!(interval("1"), None);
}

#[tokio::test(start_paused = true)]
async fn the_watchdog_is_pinged_twice_an_interval_while_the_service_is_alive() {
    let manager = Manager::new();
    let notifier = manager.notifier(&[("WATCHDOG_USEC", "10000000")]);
    let alive = Arc::new(AtomicBool::new(true));
    let stop = CancellationToken::new();
    let watchdog = notifier.watchdog(
        {
            let alive = alive.clone();
            move || alive.load(Ordering::Relaxed)
        },
        stop.clone(),
    );
    let observe = async {
        // Pings come at 0, 5, 10 and 15 seconds.
        tokio::time::sleep(Duration::from_secs(16)).await;
        assert_eq!(manager.messages(), vec!["WATCHDOG=1\n"; 4]);

        alive.store(false, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_mins(1)).await;
        assert_eq!(manager.messages(), Vec::<String>::new());

        alive.store(true, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert_eq!(manager.messages(), ["WATCHDOG=1\n"]);
        stop.cancel();
    };
    tokio::join!(watchdog, observe);
}

#[tokio::test(start_paused = true)]
async fn an_orderly_stop_waits_for_the_tasks() {
    let shutdown = Shutdown::new();
    let token = shutdown.token();
    let done = Arc::new(AtomicBool::new(false));
    shutdown.spawn({
        let done = done.clone();
        async move {
            token.cancelled().await;
            tokio::time::sleep(Duration::from_secs(5)).await;
            done.store(true, Ordering::Relaxed);
        }
    });
    assert!(!shutdown.is_stopping());
    let outcome = shutdown.stop(Duration::from_secs(30), pending()).await;
    assert_eq!(outcome, StopOutcome::Clean);
    assert!(done.load(Ordering::Relaxed));
    assert!(!shutdown.hard_token().is_cancelled());
}

#[tokio::test(start_paused = true)]
async fn a_stop_that_takes_too_long_ends_at_once() {
    let shutdown = Shutdown::new();
    let hard = shutdown.hard_token();
    shutdown.spawn(async move { hard.cancelled().await });
    let begin = Instant::now();
    let outcome = shutdown.stop(Duration::from_secs(30), pending()).await;
    assert_eq!(outcome, StopOutcome::DeadlinePassed);
    assert_eq!(begin.elapsed().as_secs(), 30);
    assert!(shutdown.tasks().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_task_that_heeds_nothing_does_not_hold_up_the_end() {
    let shutdown = Shutdown::new();
    shutdown.spawn(pending::<()>());
    let force = tokio::time::sleep(Duration::from_secs(2));
    let begin = Instant::now();
    let outcome = shutdown.stop(Duration::from_secs(30), force).await;
    assert_eq!(outcome, StopOutcome::Forced);
    assert_eq!(begin.elapsed(), Duration::from_secs(2) + HARD_GRACE);
}

#[tokio::test(start_paused = true)]
async fn a_failed_task_can_begin_the_stop() {
    let manager = Manager::new();
    let notifier = manager.notifier(&[]);
    let shutdown = Shutdown::new();
    shutdown.spawn({
        let shutdown = shutdown.clone();
        async move { shutdown.begin() }
    });
    let outcome = shutdown
        .run_until_stopped(Duration::from_secs(1), &notifier)
        .await
        .unwrap();
    assert_eq!(outcome, StopOutcome::Clean);
    assert_eq!(manager.messages(), ["STOPPING=1\n"]);
}

#[tokio::test(start_paused = true)]
async fn a_critical_task_that_ends_stops_the_service_as_failed() {
    let manager = Manager::new();
    let shutdown = Shutdown::new();
    shutdown.spawn_critical("listener", async { Err::<(), _>("the socket is gone") });
    let other = shutdown.token();
    shutdown.spawn_critical("driver", async move { other.cancelled().await });
    let outcome = shutdown
        .run_until_stopped(Duration::from_secs(1), &manager.notifier(&[]))
        .await
        .unwrap();
    assert_eq!(outcome, StopOutcome::TaskFailed);
    assert!(!outcome.is_success());
    assert_eq!(shutdown.failed_task(), Some("listener"));
    assert_eq!(manager.messages(), ["STOPPING=1\n"]);
}

#[tokio::test(start_paused = true)]
async fn a_critical_task_that_panics_stops_the_service_as_failed() {
    let shutdown = Shutdown::new();
    shutdown.spawn_critical("driver", async {
        assert_eq!(
            Shutdown::new().failed_task(),
            Some("x"),
            "a panic on purpose"
        );
    });
    shutdown.token().cancelled().await;
    let outcome = shutdown.stop(Duration::from_secs(1), pending()).await;
    assert_eq!(outcome, StopOutcome::TaskFailed);
    assert_eq!(shutdown.failed_task(), Some("driver"));
}

#[tokio::test(start_paused = true)]
async fn a_critical_task_that_ends_because_of_the_stop_is_no_failure() {
    let shutdown = Shutdown::new();
    let soft = shutdown.token();
    shutdown.spawn_critical("driver", async move {
        soft.cancelled().await;
        Err::<(), _>("cut off by the stop")
    });
    let outcome = shutdown.stop(Duration::from_secs(1), pending()).await;
    assert_eq!(outcome, StopOutcome::Clean);
    assert!(outcome.is_success());
    assert_eq!(shutdown.failed_task(), None);
}

#[tokio::test(start_paused = true)]
async fn a_loop_that_no_longer_beats_is_stuck_and_the_watchdog_falls_silent() {
    let manager = Manager::new();
    let notifier = manager.notifier(&[("WATCHDOG_USEC", "10000000")]);
    let shutdown = Shutdown::new();
    let heart = shutdown.heartbeat("driver", Duration::from_secs(8));
    let observe = async {
        // Pings are due at 0 and 5 seconds.
        tokio::time::sleep(Duration::from_secs(7)).await;
        assert_eq!(shutdown.stuck(), None);
        assert_eq!(manager.messages(), vec!["WATCHDOG=1\n"; 2]);

        tokio::time::sleep(Duration::from_secs(17)).await;
        assert_eq!(shutdown.stuck(), Some("driver"));
        assert_eq!(manager.messages(), Vec::<String>::new());

        // A beat from a worker thread counts as well, and a long step may be announced.
        heart.clone().beat_within(Duration::from_mins(1));
        tokio::time::sleep(Duration::from_secs(50)).await;
        assert_eq!(shutdown.stuck(), None);
        assert_eq!(manager.messages(), vec!["WATCHDOG=1\n"; 10]);

        tokio::time::sleep(Duration::from_secs(20)).await;
        assert_eq!(shutdown.stuck(), Some("driver"));
        // While the service stops its loops need not beat.
        shutdown.begin();
        assert_eq!(shutdown.stuck(), None);
        shutdown.stop(Duration::ZERO, pending()).await;
    };
    let hard = shutdown.hard_token();
    shutdown.spawn(async move { hard.cancelled().await });
    tokio::join!(shutdown.watchdog(&notifier), observe);
}

fn send_to_ourselves(signal: &str) {
    let status = std::process::Command::new("sh")
        .args(["-c", &format!("kill {signal} {}", std::process::id())])
        .status()
        .unwrap();
    assert!(status.success());
}

/// The only test that sends stop signals: they reach every listener of the process.
#[tokio::test]
async fn the_first_signal_stops_in_order_and_the_second_at_once() {
    let shutdown = Shutdown::new();
    let (soft, hard) = (shutdown.token(), shutdown.hard_token());
    shutdown.spawn(async move { hard.cancelled().await });
    let notifier = Notifier::from_environment(|_| None).unwrap();
    let signals = async {
        send_to_ourselves("-TERM");
        soft.cancelled().await;
        send_to_ourselves("-INT");
    };
    // `join!` polls in this order, so the signals are listened for before the first is sent.
    let (outcome, ()) = tokio::join!(
        shutdown.run_until_stopped(Duration::from_mins(1), &notifier),
        signals
    );
    assert_eq!(outcome.unwrap(), StopOutcome::Forced);
}

#[tokio::test]
async fn a_hangup_asks_for_a_reload_and_does_not_end_the_process() {
    let mut reloads = reload_signals().unwrap();
    for _ in 0..2 {
        send_to_ourselves("-HUP");
        assert_eq!(reloads.next().await, Some(()));
    }
}
