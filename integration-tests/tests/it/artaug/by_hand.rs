//! Workers that nobody but an operator starts, as on other machines.

use concord_integration_tests::harness::{Federation, PATIENCE, Program, wait_for};
use concord_proto::v1;

use super::super::{operator_of, runtime};
use super::{
    JOB, accept_all, artefacts, is_over, journals, loras, show, submit_as, with_prompts,
    write_worker,
};

fn started(federation: &Federation, name: &str) -> Program {
    write_worker(federation, name);
    let config = format!("{name}.toml");
    let arguments = ["run", "--config", &config];
    Program::start("concord-artaug", name, federation.path(), &arguments, &[]).unwrap()
}

#[test]
fn a_worker_lets_go_at_a_pause_and_one_on_another_machine_ends_the_job() {
    let federation = with_prompts("");
    let mut operator = operator_of(&federation);
    let mut first = started(&federation, "gpu-1");
    let job_id = runtime().block_on(submit_as(&mut operator, "by hand", 1));
    let folder = federation.path().join("gpu-1");
    wait_for("a checkpoint of the first worker", JOB, || {
        runtime().block_on(accept_all(&mut operator, &job_id));
        let journal = journals(&folder);
        Ok(journal.contains("\"event\":\"checkpointed\"").then_some(()))
    })
    .unwrap();

    let request = v1::PauseJobRequest {
        job_id: job_id.clone(),
    };
    runtime().block_on(operator.pause_job(request)).unwrap();
    let resting = wait_for("the worker to let go", PATIENCE, || {
        let job = runtime().block_on(show(&mut operator, &job_id));
        Ok(job.worker.is_empty().then_some(job))
    })
    .unwrap();
    assert!(resting.paused && !is_over(&resting), "{resting:?}");
    let status = first.terminate(PATIENCE).unwrap();
    assert!(status.success(), "{status}: {}", first.log());
    let before = journals(&folder);
    assert!(before.contains("checkpointed"));

    let mut second = started(&federation, "gpu-2");
    let request = v1::ResumeJobRequest {
        job_id: job_id.clone(),
    };
    runtime().block_on(operator.resume_job(request)).unwrap();
    // A worker's copy is gone once its job has ended.
    let (folder, mut last) = (federation.path().join("gpu-2"), String::new());
    let ended = wait_for("end of the job", JOB, || {
        runtime().block_on(accept_all(&mut operator, &job_id));
        let journal = journals(&folder);
        if !journal.is_empty() {
            last = journal;
        }
        let job = runtime().block_on(show(&mut operator, &job_id));
        Ok(is_over(&job).then_some(job))
    })
    .unwrap();
    assert_eq!(ended.state(), v1::JobState::Succeeded, "{}", ended.reason);
    // It went on where the first had let go.
    assert!(last.starts_with(&before) && last.len() > before.len());
    let results = runtime().block_on(artefacts(&mut operator, &job_id));
    assert!(!loras(&results).is_empty());
    let status = second.terminate(PATIENCE).unwrap();
    assert!(status.success(), "{status}: {}", second.log());
}
