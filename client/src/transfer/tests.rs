use concord_common::{
    RoundNumber,
    adapter::{AdapterShape, InitialScale},
    round::Outcome,
    seed::Seed,
};
use concord_learning::{
    Kind,
    adapter::{GlobalBase, GlobalUpdate},
};

use super::*;
use crate::{
    coordinator::memory::Federation,
    egress::{Assignment, GateLimits},
    testing::{Call, Deed, Fault, Faulty, Home, NO_LIMITS, QUICK, federation, job},
};

/// An adapter of three chunks.
const SPEC: &str = r#"kind = "federated-training"
name = "large"
task = "toy"
[backbone]
name = "large"
hidden = 1024
layers = 1
[adapter]
bottleneck = 64
[algorithm]
name = "fedavg"
[rounds]
count = 1
"#;
const ADAPTER_BYTES: u64 = 4 * (2 * 1024 * 64 + 64 + 1024);
const CHUNK: u64 = 256 << 10;

fn shape() -> AdapterShape {
    AdapterShape {
        hidden: 1024,
        bottleneck: 64,
        layers: vec![0],
        shared_head: None,
    }
}

struct Scene {
    home: Home,
    federation: Arc<Federation>,
    server: Faulty,
}

impl Scene {
    fn new() -> Self {
        let home = Home::new("north");
        let federation = federation(SPEC, &["north", "south"]);
        Self {
            server: Faulty::new(federation.coordinator(home.silo.clone())),
            home,
            federation,
        }
    }

    fn base(&self) -> AdapterVersion {
        self.federation.versions()[0]
    }

    fn payload(&self) -> Bytes {
        self.federation.payload(&job(), self.base()).unwrap()
    }

    fn part_file(&self) -> PathBuf {
        self.home
            .folder
            .path()
            .join(format!("downloads/{}.adapter", self.base()))
    }

    async fn fetch(&self) -> Result<Bytes, TransferError> {
        let downloads = Downloads::open(self.home.folder.path()).unwrap();
        let layout = shape().layout().unwrap();
        fetch(
            &self.server,
            &downloads,
            &job(),
            self.base(),
            &layout,
            QUICK,
            &self.home.stop,
        )
        .await
    }

    /// What a trained adapter would send.
    fn update(&self) -> GlobalUpdate {
        let other = shape()
            .initial_payload(InitialScale::default(), Seed(9))
            .unwrap();
        let moved = GlobalBase::receive(&shape(), &other)
            .unwrap()
            .adapter(Kind::Float)
            .unwrap();
        let base = GlobalBase::receive(&shape(), &self.payload()).unwrap();
        moved.export(None, &base).unwrap()
    }

    async fn deliver(&self, token: Option<Vec<u8>>) -> Result<SignedReceipt, TransferError> {
        self.deliver_through(&self.home.gate(), token).await
    }

    async fn deliver_through(
        &self,
        gate: &Arc<EgressGate>,
        token: Option<Vec<u8>>,
    ) -> Result<SignedReceipt, TransferError> {
        let assignment = Assignment {
            job: job(),
            round: RoundNumber(1),
            layout: shape().layout().unwrap(),
            base: self.base(),
            max_update_norm: None,
            max_examples: 100,
        };
        let cleared = gate.pass(&assignment, self.update(), 10).unwrap();
        let token = match token {
            Some(token) => token,
            None => {
                self.server
                    .claim(&job(), RoundNumber(1))
                    .await
                    .unwrap()
                    .token
            }
        };
        let delivery = Delivery {
            coordinator: &self.server,
            gate,
            silo: &self.home.silo,
            receipt_key: &self.federation.receipt_key(),
            pace: QUICK,
            stop: &self.home.stop,
        };
        delivery.deliver(&cleared, token).await
    }

    /// Offsets of the logged attempts.
    fn departures(&self) -> Vec<u64> {
        let log = self.home.egress_log();
        log.iter()
            .map(|line| line["offset"].as_u64().unwrap())
            .collect()
    }
}

#[tokio::test]
async fn what_the_disk_altered_after_the_checks_is_fetched_anew() {
    let scene = Scene::new();
    let file = scene.part_file();
    let altered = Deed::new(move || {
        use std::io::Write as _;
        let file = fs::OpenOptions::new().append(true).open(&file);
        file.unwrap().write_all(b"x").unwrap();
    });
    scene.server.plan(Call::Download, Fault::Last(altered));
    assert_eq!(scene.fetch().await.unwrap(), scene.payload());
    assert_eq!(scene.server.calls(), 2);
}

#[tokio::test]
async fn a_download_goes_on_where_it_broke_off() {
    let scene = Scene::new();
    scene.server.plan(Call::Download, Fault::Cut(2));
    scene.server.plan(Call::Download, Fault::Unreachable);
    assert_eq!(scene.fetch().await.unwrap(), scene.payload());
    assert_eq!(scene.server.calls(), 3);
}

#[tokio::test]
async fn a_half_download_survives_the_daemon() {
    let scene = Scene::new();
    fs::create_dir_all(scene.part_file().parent().unwrap()).unwrap();
    fs::set_permissions(
        scene.part_file().parent().unwrap(),
        std::os::unix::fs::PermissionsExt::from_mode(0o700),
    )
    .unwrap();
    // All but a few bytes, cut in the middle of an element.
    let have = ADAPTER_BYTES as usize - 7;
    fs::write(scene.part_file(), &scene.payload()[..have]).unwrap();
    scene.server.plan(Call::Download, Fault::OtherBytes);
    // The first bytes of what is still missing come altered: a second attempt begins anew.
    assert_eq!(scene.fetch().await.unwrap(), scene.payload());
    assert_eq!(scene.server.calls(), 2);
    // A whole file is not fetched again.
    assert_eq!(scene.fetch().await.unwrap(), scene.payload());
    assert_eq!(scene.server.calls(), 2);
}

#[tokio::test]
async fn another_adapters_half_download_is_removed() {
    let scene = Scene::new();
    scene.fetch().await.unwrap();
    let old = scene.part_file().with_file_name("old.adapter");
    fs::write(&old, b"old").unwrap();
    scene.fetch().await.unwrap();
    assert!(!old.exists());
}

#[tokio::test]
async fn a_server_that_keeps_sending_other_bytes_is_given_up() {
    let scene = Scene::new();
    for _ in 0..MAX_FAULTS {
        scene.server.plan(Call::Download, Fault::OtherBytes);
    }
    let error = scene.fetch().await.unwrap_err();
    assert!(
        matches!(
            error,
            TransferError::Halt(Halt::Call(CallError::Protocol(_)))
        ),
        "{error}"
    );
    assert_eq!(scene.fetch().await.unwrap(), scene.payload());
}

#[tokio::test]
async fn a_stop_ends_a_download_that_cannot_be_had() {
    let scene = Scene::new();
    scene.server.set_down(true);
    let stop = scene.home.stop.clone();
    let (outcome, ()) = tokio::join!(scene.fetch(), async {
        crate::testing::eventually("a few attempts", || scene.server.calls() > 3).await;
        stop.cancel();
    });
    assert!(matches!(outcome, Err(TransferError::Halt(Halt::Stopped))));
}

#[tokio::test]
async fn an_upload_goes_on_where_the_server_wants_and_logs_each_attempt() {
    let scene = Scene::new();
    scene.server.plan(Call::Upload, Fault::Cut(1));
    scene.server.plan(Call::Upload, Fault::Cut(1));
    let receipt = scene.deliver(None).await.unwrap();
    assert_eq!(receipt.receipt.outcome, Outcome::Accepted);
    assert_eq!(scene.departures(), [0, CHUNK, 2 * CHUNK]);
    let bytes: u64 = scene
        .home
        .egress_log()
        .iter()
        .map(|line| line["bytes"].as_u64().unwrap())
        .sum();
    assert_eq!(bytes, 3 * ADAPTER_BYTES - 3 * CHUNK);
}

#[tokio::test]
async fn busy_answers_and_broken_connections_do_not_use_the_byte_budget_up() {
    let scene = Scene::new();
    for _ in 0..20 {
        let busy = Fault::Refused(ErrorCode::Busy);
        scene.server.plan(Call::Upload, busy);
        scene.server.plan(Call::Upload, Fault::Unreachable);
    }
    scene.server.plan(Call::Upload, Fault::Cut(1));
    let limits = GateLimits {
        bytes_per_job: ADAPTER_BYTES,
        ..NO_LIMITS
    };
    let gate = scene.home.gate_within(limits);
    let receipt = scene.deliver_through(&gate, None).await.unwrap();
    assert_eq!(receipt.receipt.outcome, Outcome::Accepted);
    assert_eq!(scene.server.left(), 0);
    assert_eq!(scene.departures().len(), 42, "each attempt is in the log");
    assert_eq!(gate.spent(&job()), ADAPTER_BYTES);
    let reopened = scene.home.gate();
    assert_eq!(reopened.spent(&job()), ADAPTER_BYTES, "after a restart");
}

#[tokio::test]
async fn a_lost_receipt_is_asked_for_again_without_sending_twice() {
    let scene = Scene::new();
    scene.server.plan(Call::Upload, Fault::LostAnswer);
    let receipt = scene.deliver(None).await.unwrap();
    assert_eq!(receipt.receipt.outcome, Outcome::Accepted);
    assert_eq!(scene.departures(), [0]);
}

#[tokio::test]
async fn all_bytes_there_and_only_the_receipt_missing_is_finished_with_an_empty_upload() {
    let scene = Scene::new();
    scene.server.plan(Call::Upload, Fault::Cut(3));
    let receipt = scene.deliver(None).await.unwrap();
    assert_eq!(receipt.receipt.outcome, Outcome::Accepted);
    assert_eq!(scene.departures(), [0, ADAPTER_BYTES]);
}

#[tokio::test]
async fn a_lost_lease_is_claimed_again() {
    let scene = Scene::new();
    let receipt = scene.deliver(Some(vec![0; 16])).await.unwrap();
    assert_eq!(receipt.receipt.outcome, Outcome::Accepted);
}

#[tokio::test]
async fn an_upload_that_the_server_forgot_begins_anew() {
    let scene = Scene::new();
    scene
        .server
        .plan(Call::Upload, Fault::Refused(ErrorCode::UnknownUpload));
    assert!(scene.deliver(None).await.is_ok());
}

#[tokio::test]
async fn a_refusal_of_the_update_is_handed_up() {
    let scene = Scene::new();
    scene
        .server
        .plan(Call::Begin, Fault::Refused(ErrorCode::NormTooLarge));
    match scene.deliver(None).await.unwrap_err() {
        TransferError::Halt(Halt::Call(CallError::Refused(refusal))) => {
            assert_eq!(refusal.code, ErrorCode::NormTooLarge);
        }
        error => panic!("{error}"),
    }
    assert!(
        !scene.home.folder.path().join("egress.jsonl").exists()
            || scene.home.egress_log().is_empty()
    );
}

#[tokio::test]
async fn a_receipt_that_the_server_did_not_sign_is_not_believed() {
    let scene = Scene::new();
    scene.server.plan(Call::Upload, Fault::Forged);
    let error = scene.deliver(None).await.unwrap_err();
    assert!(matches!(error, TransferError::Receipt(_)), "{error}");
}
