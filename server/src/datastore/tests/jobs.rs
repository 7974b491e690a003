//! Jobs and the numbers reported for them.

use super::*;

pub(super) async fn a_job_is_stored_once_per_request_id(datastore: &Datastore) {
    let first = &new_job("j");
    let mut second = new_job("k");
    second.request_id.clone_from(&first.request_id);
    let second = &second;
    tx!(datastore, |tx| tx.insert_job(first).await?);
    let again = datastore
        .run_tx("test", |tx| {
            Box::pin(async move { Ok::<_, Failure>(tx.insert_job(second).await?) })
        })
        .await;
    assert!(again.is_err());
    let found = tx!(datastore, |tx| tx.job_by_request(&first.request_id).await?);
    assert_eq!(found.unwrap().job_id, first.job_id);
}

pub(super) async fn a_job_goes_from_queued_to_running_to_its_end(datastore: &Datastore) {
    let job = &new_job("j");
    let id = &job.job_id;
    tx!(datastore, |tx| tx.insert_job(job).await?);
    let queued = tx!(datastore, |tx| tx.job(id).await?).unwrap();
    assert_eq!((queued.state, queued.round), (JobState::Queued, 0));
    assert_eq!((queued.adapter_version, queued.started_at), (None, None));
    tx!(datastore, |tx| tx.start_job(id, version("0"), T).await?);
    tx!(datastore, |tx| {
        tx.set_job_round(id, RoundNumber(3)).await?;
        tx.set_job_version(id, version("3")).await?;
        tx.end_job(id, JobState::Failed, "too few", T + Duration::from_secs(9))
            .await?;
    });
    let ended = tx!(datastore, |tx| tx.job(id).await?).unwrap();
    assert!(ended.has_ended());
    assert_eq!(
        (ended.state, ended.reason.as_str()),
        (JobState::Failed, "too few")
    );
    assert_eq!(
        (ended.round, ended.adapter_version),
        (3, Some(version("3")))
    );
    for late in [JobState::Succeeded, JobState::Cancelled] {
        let again = datastore
            .run_tx("test", |tx| {
                Box::pin(async move { Ok::<_, Failure>(tx.end_job(id, late, "", T).await?) })
            })
            .await;
        assert!(again.is_err());
    }
}

pub(super) async fn jobs_are_listed_newest_first_and_queued_oldest_first(datastore: &Datastore) {
    for name in ["j1", "j2", "j3"] {
        let job = &new_job(name);
        tx!(datastore, |tx| tx.insert_job(job).await?);
    }
    let names = |jobs: Vec<JobRecord>| -> Vec<String> {
        jobs.iter().map(|job| job.job_id.to_string()).collect()
    };
    let newest = tx!(datastore, |tx| tx.newest_jobs(2).await?);
    assert_eq!(names(newest), ["j3", "j2"]);
    let queued = tx!(datastore, |tx| tx
        .jobs_in_state(JobState::Queued, FEDERATED)
        .await?);
    assert_eq!(names(queued), ["j1", "j2", "j3"]);
}

fn report(value: f64, round: u32) -> MetricReport {
    MetricReport {
        silo: silo("a"),
        job: job_id("j"),
        round: RoundNumber(round),
        point: MetricPoint::AfterTraining,
        metrics: BTreeMap::from([("accuracy".to_owned(), value)]),
    }
}

pub(super) async fn a_report_for_the_same_point_replaces_the_earlier_one(datastore: &Datastore) {
    let (job, _) = &running_job(datastore).await;
    for report in [&report(0.1, 1), &report(1.0 / 3.0, 2), &report(0.2, 1)] {
        tx!(datastore, |tx| tx.put_report(report).await?);
    }
    let all = tx!(datastore, |tx| tx.reports_after(job, 0).await?);
    let reports: Vec<_> = all.iter().map(|record| record.report.clone()).collect();
    assert_eq!(reports, [report(0.2, 1), report(1.0 / 3.0, 2)]);
    let newest = all[0].seq;
    assert!(newest > all[1].seq);
    assert!(tx!(datastore, |tx| tx.reports_after(job, newest).await?).is_empty());
}
