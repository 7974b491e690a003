//! A silo that declines a job, and daemons that do not start.

use std::{fs, path::PathBuf};

use concord_common::Role;
use concord_integration_tests::harness::{PATIENCE, run, wait_for};
use concord_proto::v1;

use super::super::{operator_of, runtime, submit};
use super::{daemons, federation, job, show};

#[test]
fn a_silo_without_the_backbone_declines_and_the_job_says_who_and_why() {
    let federation = federation();
    let mut daemons = daemons(&federation);
    let config = daemons[1].config();
    let text = fs::read_to_string(&config).unwrap();
    fs::write(
        &config,
        text.replace("name = \"tiny\"", "name = \"another\""),
    )
    .unwrap();
    for daemon in &mut daemons {
        daemon.start(&[]).unwrap();
    }
    let spec = job(2).replace("min_silos = 3", "min_silos = 2");
    let job_id = runtime().block_on(submit(&mut operator_of(&federation), spec));
    let shown = wait_for("finished job", PATIENCE * 2, || {
        let shown = show(&federation, &job_id);
        let state = shown.job.as_ref().unwrap().state();
        Ok(matches!(state, v1::JobState::Succeeded | v1::JobState::Failed).then_some(shown))
    })
    .unwrap();
    assert_eq!(shown.job.unwrap().state(), v1::JobState::Succeeded);
    let declined = shown
        .silos
        .iter()
        .find(|silo| silo.silo_id == "silo-b")
        .unwrap();
    assert_eq!(declined.reason, "UNKNOWN_BACKBONE", "{declined:?}");
    assert_eq!(declined.accepted, 0);
}

#[test]
fn two_daemons_cannot_share_a_state_folder() {
    let federation = federation();
    let mut daemons = daemons(&federation);
    daemons[0].start(&[]).unwrap();
    let second = run(
        "concord-client",
        daemons[0].folder(),
        &["run", "--config", "client.toml"],
    )
    .unwrap();
    assert_ne!(second.code(), 0);
    assert!(second.stderr.contains("another daemon"), "{second:?}");
}

#[test]
fn an_operators_certificate_does_not_make_a_daemon() {
    let federation = federation();
    let daemons = daemons(&federation);
    let operator = federation.issue(Role::Operator, "anna").unwrap();
    let config: PathBuf = daemons[0].config();
    let silo = federation.issue(Role::Silo, "silo-a").unwrap();
    let text = fs::read_to_string(&config)
        .unwrap()
        .replace(
            silo.certificate.to_str().unwrap(),
            operator.certificate.to_str().unwrap(),
        )
        .replace(silo.key.to_str().unwrap(), operator.key.to_str().unwrap());
    fs::write(&config, text).unwrap();
    let check = ["check-config", "--config", "client.toml"];
    let output = run("concord-client", daemons[0].folder(), &check).unwrap();
    assert_eq!(output.code(), 78, "{output:?}");
    assert!(output.stderr.contains("operator"), "{output:?}");
}
