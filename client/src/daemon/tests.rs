use std::sync::Arc;

use concord_common::round::job::JobState;

use super::*;

mod choices;
mod kills;

use crate::{
    coordinator::{grpc::GrpcCoordinator, memory::Federation},
    testing::{Call, FakeServer, Fault, Faulty, Home, eventually, federation, reported, spec},
    vault::Record,
};
use tokio::task::JoinHandle;
use tokio_util::task::TaskTracker;
use tonic::transport::{Channel, Endpoint};

const POLL: Duration = Duration::from_millis(20);

/// A silo's daemon on a server that misbehaves.
struct Running {
    home: Home,
    server: Faulty,
    task: JoinHandle<Result<(), SessionError>>,
    board: Arc<crate::status::StatusBoard>,
}

impl Running {
    fn start(name: &str, federation: &Arc<Federation>, prepare: impl FnOnce(&Faulty)) -> Self {
        Self::of(Home::new(name), federation, prepare)
    }

    /// The daemon of a silo that has a folder already.
    fn of(home: Home, federation: &Arc<Federation>, prepare: impl FnOnce(&Faulty)) -> Self {
        let server = Faulty::new(federation.coordinator(home.silo.clone()));
        prepare(&server);
        let session = home.session(server.clone(), &[]);
        let board = Arc::clone(&session.board);
        let daemon = Daemon::new(session, "memory".to_owned(), POLL);
        let heart = Heartbeat::new("daemon", Duration::from_mins(1));
        Self {
            task: TaskTracker::new().spawn(daemon.run_with(heart)),
            home,
            server,
            board,
        }
    }

    async fn stop(self) -> Home {
        self.home.stop.cancel();
        self.task.await.unwrap().unwrap();
        self.home
    }
}

fn is_over(federation: &Federation) -> bool {
    federation.outcome().0.is_over()
}

#[tokio::test]
async fn two_daemons_run_a_job_from_its_first_round_to_the_models() {
    let federation = federation(&spec("fedmcp", 3, ""), &["north", "south"]);
    let north = Running::start("north", &federation, |_| {});
    let south = Running::start("south", &federation, |_| {});
    let tested = |name| reported(&federation, name, 3, "final_test").is_some();
    eventually("both silos' final tests", || {
        tested("north") && tested("south")
    })
    .await;
    assert_eq!(federation.outcome().0, JobState::Succeeded);
    assert_eq!(federation.versions().len(), 4);
    let (north, south) = (north.stop().await, south.stop().await);
    for home in [north, south] {
        let job = crate::testing::job();
        assert!(home.vault().read(&job, Record::Model).unwrap().is_some());
        assert!(home.vault().read(&job, Record::State).unwrap().is_none());
    }
}

#[tokio::test]
async fn a_server_that_is_not_up_yet_is_waited_for() {
    let federation = federation(&spec("fedavg", 1, "min_silos = 1"), &["north"]);
    let north = Running::start("north", &federation, |server| server.set_down(true));
    eventually("several attempts", || north.server.calls() > 5).await;
    let status = north.board.status();
    assert!(!status.connected && status.last_error.is_some());
    north.server.set_down(false);
    eventually("the job's end", || is_over(&federation)).await;
    assert!(north.board.status().connected);
    north.stop().await;
}

#[tokio::test]
async fn a_server_that_goes_away_at_any_call_and_comes_back_loses_nothing() {
    let plain = {
        let federation = federation(&spec("fedmcp", 2, ""), &["north", "south"]);
        let daemons = [
            Running::start("north", &federation, |_| {}),
            Running::start("south", &federation, |_| {}),
        ];
        eventually("the undisturbed end", || is_over(&federation)).await;
        for daemon in daemons {
            daemon.stop().await;
        }
        federation.versions()
    };
    let federation = federation(&spec("fedmcp", 2, ""), &["north", "south"]);
    let calls = [
        Call::Info,
        Call::Poll,
        Call::Watch,
        Call::Claim,
        Call::Download,
        Call::Report,
        Call::Begin,
        Call::Upload,
    ];
    let north = Running::start("north", &federation, |server| {
        for call in calls {
            server.plan(call, Fault::Unreachable);
            if !matches!(call, Call::Download | Call::Watch) {
                server.plan(call, Fault::LostAnswer);
            }
        }
    });
    let south = Running::start("south", &federation, |_| {});
    eventually("the disturbed end", || is_over(&federation)).await;
    eventually("every fault", || north.server.left() == 0).await;
    assert_eq!(
        federation.versions(),
        plain,
        "the same adapters as without faults"
    );
    north.stop().await;
    south.stop().await;
}

#[tokio::test]
async fn a_watch_that_breaks_is_begun_anew() {
    let federation = federation(&spec("fedavg", 2, ""), &["north", "south"]);
    let north = Running::start("north", &federation, |server| {
        server.plan(Call::Watch, Fault::Cut(0));
        server.plan(Call::Watch, Fault::Cut(1));
    });
    eventually("north's first round", || {
        reported(&federation, "north", 1, "training").is_some()
    })
    .await;
    eventually("both broken watches", || north.server.left() == 0).await;
    let south = Running::start("south", &federation, |_| {});
    eventually("the job's end", || is_over(&federation)).await;
    north.stop().await;
    south.stop().await;
}

#[tokio::test]
async fn a_declined_job_is_not_asked_about_again() {
    let federation = federation(
        &spec("fedavg", 1, "").replace("name = \"tiny\"", "name = \"huge\""),
        &["north", "south"],
    );
    let north = Running::start("north", &federation, |_| {});
    eventually("the decline", || north.board.status().last_error.is_some()).await;
    eventually("more polls", || north.server.calls() > 8).await;
    let home = north.stop().await;
    let declines = home
        .egress_log()
        .iter()
        .filter(|line| line["kind"] == "decline")
        .count();
    assert_eq!(declines, 1);
}

#[tokio::test]
async fn a_server_of_another_federation_gets_nothing() {
    let federation = federation(&spec("fedavg", 1, "min_silos = 1"), &["north"]);
    let home = Home::new("north");
    let server = Faulty::new(federation.coordinator(home.silo.clone()));
    let session = home.session(server.clone(), &[]);
    let board = Arc::clone(&session.board);
    let daemon = TaskTracker::new().spawn(Daemon::new(session, "other".to_owned(), POLL).run());
    eventually("the refusal", || board.status().last_error.is_some()).await;
    assert!(
        board
            .status()
            .last_error
            .unwrap()
            .message
            .contains("`memory`")
    );
    home.stop.cancel();
    daemon.await.unwrap().unwrap();
    assert!(home.egress_log().is_empty());
}

#[tokio::test]
async fn a_receipt_key_that_has_changed_is_asked_for_and_the_work_goes_on() {
    let federation = federation(&spec("fedavg", 1, ""), &["north", "south"]);
    let north = Running::start("north", &federation, |server| {
        server.plan(Call::Info, Fault::Forged);
    });
    eventually("the receipt", || north.home.receipts().len() == 1).await;
    let south = Running::start("south", &federation, |_| {});
    eventually("the job's end", || is_over(&federation)).await;
    south.stop().await;
    let kept = north.stop().await.receipts().remove(0);
    assert_eq!(kept.key_id, key_id(&federation.receipt_key()));
    kept.verify().unwrap();
}

#[tokio::test]
async fn a_disk_that_fails_for_a_while_costs_a_silo_no_round() {
    let federation = federation(&spec("fedavg", 2, "min_silos = 1"), &["north"]);
    let home = Home::new("north");
    let file = home.vault().file(&crate::testing::job(), Record::State);
    std::fs::create_dir_all(&file).unwrap();
    let north = Running::of(home, &federation, |_| {});
    eventually("the fault", || north.board.status().last_error.is_some()).await;
    eventually("more attempts", || north.server.calls() > 8).await;
    assert!(!is_over(&federation));
    std::fs::remove_dir_all(file.parent().unwrap()).unwrap();
    eventually("the job's end", || is_over(&federation)).await;
    assert_eq!(federation.outcome().0, JobState::Succeeded);
    assert_eq!(federation.versions().len(), 3);
    north.stop().await;
}

fn channel(server: &FakeServer) -> Channel {
    Endpoint::from_shared(format!("http://{}", server.address))
        .unwrap()
        .connect_lazy()
}

/// Like a daemon of its own, over gRPC.
fn over_grpc(home: &Home, server: &FakeServer) -> JoinHandle<Result<(), SessionError>> {
    let coordinator = GrpcCoordinator::new(channel(server), Duration::from_secs(20));
    let session = home.session(coordinator, &[]);
    TaskTracker::new().spawn(Daemon::new(session, "memory".to_owned(), POLL).run())
}

#[tokio::test]
async fn over_grpc_a_restarted_server_finds_its_daemon_again() {
    let spec_toml = spec("fedmcp", 3, "min_silos = 1");
    let expected = {
        let federation = federation(&spec_toml, &["north"]);
        let north = Running::start("north", &federation, |_| {});
        eventually("the end in memory", || is_over(&federation)).await;
        north.stop().await;
        federation.versions()
    };
    let federation = federation(&spec_toml, &["north"]);
    let home = Home::new("north");
    let anywhere = "127.0.0.1:0".parse().unwrap();
    let server = FakeServer::start(Arc::clone(&federation), home.silo.clone(), anywhere).await;
    let address = server.address;
    let daemon = over_grpc(&home, &server);
    eventually("the first adapter", || federation.versions().len() > 1).await;
    server.stop().await;
    let again = FakeServer::start(Arc::clone(&federation), home.silo.clone(), address).await;
    eventually("the final test", || {
        reported(&federation, "north", 3, "final_test").is_some()
    })
    .await;
    assert_eq!(federation.versions(), expected, "gRPC changes no byte");
    home.stop.cancel();
    daemon.await.unwrap().unwrap();
    again.stop().await;
}

#[tokio::test]
async fn over_grpc_a_refusal_keeps_its_code() {
    let federation = federation(
        &spec("fedavg", 1, "").replace("task = \"toy\"", "task = \"other\""),
        &["north", "south"],
    );
    let home = Home::new("north");
    let anywhere = "127.0.0.1:0".parse().unwrap();
    let server = FakeServer::start(Arc::clone(&federation), home.silo.clone(), anywhere).await;
    let coordinator = GrpcCoordinator::new(channel(&server), Duration::from_secs(20));
    let error = coordinator
        .claim(&crate::testing::job(), RoundNumber(9))
        .await
        .unwrap_err();
    assert_eq!(error.code(), Some(concord_common::ErrorCode::WrongRound));
    let daemon = over_grpc(&home, &server);
    eventually("the decline", || {
        home.folder.path().join("egress.jsonl").exists()
            && home
                .egress_log()
                .iter()
                .any(|line| line["kind"] == "decline")
    })
    .await;
    home.stop.cancel();
    daemon.await.unwrap().unwrap();
    server.stop().await;
}

#[tokio::test]
async fn a_server_that_does_not_answer_is_unavailable() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let channel = Endpoint::from_shared(url).unwrap().connect_lazy();
    let coordinator = GrpcCoordinator::new(channel, Duration::from_millis(50));
    let error = coordinator.info().await.unwrap_err();
    assert!(
        error.is_transient() && error.to_string().contains("no answer"),
        "{error}"
    );
    drop(listener);
    let error = coordinator.info().await.unwrap_err();
    assert!(error.is_transient(), "{error}");
}
