//! What the services tell the service manager, seen from its end of the socket.

use std::{
    os::unix::net::UnixDatagram,
    path::Path,
    time::{Duration, Instant},
};

use concord_integration_tests::harness::{Daemon, Federation, PATIENCE, Program, ServerOptions};

use super::{artaug, daemon};

/// A service manager's socket.
struct Manager {
    socket: UnixDatagram,
}

impl Manager {
    fn listen(path: &Path) -> Self {
        let socket = UnixDatagram::bind(path).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_millis(100)))
            .unwrap();
        Self { socket }
    }

    /// Waits for a message that has the line `wanted`; gives the lines that came before it.
    fn wait_for(&self, wanted: &str) -> Vec<String> {
        let deadline = Instant::now() + PATIENCE;
        let mut seen = Vec::new();
        while Instant::now() < deadline {
            let mut buffer = [0; 4096];
            let Ok(count) = self.socket.recv(&mut buffer) else {
                continue;
            };
            let text = String::from_utf8_lossy(&buffer[..count]).into_owned();
            let found = text.lines().any(|line| line == wanted);
            seen.extend(text.lines().map(str::to_owned));
            if found {
                return seen;
            }
        }
        panic!("no {wanted} came, only {seen:?}");
    }
}

const WATCHDOG: (&str, &str) = ("WATCHDOG_USEC", "400000");

/// Ready, then pings, then the announcement of the end, and an exit code of 0.
fn lives_by_the_protocol(manager: &Manager, program: &mut Program) {
    let before = manager.wait_for("READY=1");
    assert!(
        !before
            .iter()
            .any(|line| line == "WATCHDOG=1" || line == "STOPPING=1"),
        "{before:?}"
    );
    for _ in 0..3 {
        manager.wait_for("WATCHDOG=1");
    }
    program.signal("TERM").unwrap();
    manager.wait_for("STOPPING=1");
    let status = program.wait(PATIENCE).unwrap();
    assert!(status.success(), "{status}: {}", program.log());
}

#[test]
fn the_server_is_ready_pings_and_stops_as_systemd_expects() {
    let mut federation = Federation::new(&ServerOptions::default()).unwrap();
    let path = federation.path().join("notify");
    let manager = Manager::listen(&path);
    federation.set_variable("NOTIFY_SOCKET", path.to_str().unwrap());
    federation.set_variable(WATCHDOG.0, WATCHDOG.1);
    federation.start_server().unwrap();
    lives_by_the_protocol(&manager, federation.server().unwrap());
}

#[test]
fn a_reload_is_announced_and_ends_with_ready() {
    let mut federation = Federation::new(&ServerOptions::default()).unwrap();
    let path = federation.path().join("notify");
    let manager = Manager::listen(&path);
    federation.set_variable("NOTIFY_SOCKET", path.to_str().unwrap());
    federation.start_server().unwrap();
    manager.wait_for("READY=1");
    federation.server().unwrap().signal("HUP").unwrap();
    manager.wait_for("RELOADING=1");
    manager.wait_for("READY=1");
    assert!(
        federation
            .server()
            .unwrap()
            .log()
            .contains("certificates read anew")
    );
}

#[test]
fn a_daemon_is_ready_pings_and_stops_as_systemd_expects_also_without_a_server() {
    let mut federation = daemon::federation();
    let address = federation.grpc_address().to_string();
    federation.stop_server().unwrap();
    let [(name, task), ..] = daemon::tasks();
    let mut silo = Daemon::new(&federation, name, &address, &task).unwrap();
    let path = federation.path().join("notify");
    let manager = Manager::listen(&path);
    silo.start(&[("NOTIFY_SOCKET", path.to_str().unwrap()), WATCHDOG])
        .unwrap();
    lives_by_the_protocol(&manager, silo.program().unwrap());
}

#[test]
fn a_worker_is_ready_and_announces_its_end_also_without_a_server() {
    let mut federation = Federation::new(&ServerOptions::default()).unwrap();
    federation.start_server().unwrap();
    artaug::write_worker(&federation, "gpu-1");
    federation.stop_server().unwrap();
    let path = federation.path().join("notify");
    let manager = Manager::listen(&path);
    let mut worker = Program::start(
        "concord-artaug",
        "gpu-1",
        federation.path(),
        &["run", "--config", "gpu-1.toml"],
        &[("NOTIFY_SOCKET", path.to_str().unwrap())],
    )
    .unwrap();
    manager.wait_for("READY=1");
    worker.signal("TERM").unwrap();
    manager.wait_for("STOPPING=1");
    let status = worker.wait(PATIENCE).unwrap();
    assert!(status.success(), "{status}: {}", worker.log());
}
