//! Silos and the jobs that they are told of.

use super::*;

pub(super) async fn a_silo_keeps_its_enrollment_and_first_call(datastore: &Datastore) {
    let a = &silo("a");
    tx!(datastore, |tx| tx
        .see_silo(a, Enrollment::Pending, T)
        .await?);
    assert!(tx!(datastore, |tx| tx
        .set_enrollment(a, Enrollment::Active)
        .await?));
    assert!(!tx!(datastore, |tx| tx
        .set_enrollment(&silo("b"), Enrollment::Active)
        .await?));
    let later = T + Duration::from_secs(5);
    tx!(datastore, |tx| tx
        .see_silo(a, Enrollment::Pending, later)
        .await?);
    let seen = SiloRecord {
        silo_id: a.clone(),
        enrollment: Enrollment::Active,
        first_seen: T,
        last_seen: later,
    };
    assert_eq!(tx!(datastore, |tx| tx.silo(a).await?).as_ref(), Some(&seen));
    assert_eq!(tx!(datastore, |tx| tx.silos().await?), [seen]);
}

pub(super) async fn jobs_of_a_silo_end_with_their_time_also_after_its_no(datastore: &Datastore) {
    let (job, _) = &running_job(datastore).await;
    let (a, b) = (&silo("a"), &silo("b"));
    let seen = async |silo: &SiloId, since: Timestamp| {
        tx!(datastore, |tx| tx.notices_of_silo(silo, since, 50).await?).len()
    };
    tx!(datastore, |tx| tx
        .decline_job(job, b, ErrorCode::UnknownTask, "no such task")
        .await?);
    assert_eq!(
        (
            seen(a, T).await,
            seen(b, T).await,
            seen(&silo("z"), T).await
        ),
        (1, 1, 0)
    );
    let parts = tx!(datastore, |tx| tx.job_silos(job).await?);
    assert_eq!(
        parts[1].declined,
        Some((ErrorCode::UnknownTask, "no such task".to_owned()))
    );
    tx!(datastore, |tx| {
        tx.count_bytes(job, a, 10, 200).await?;
        tx.count_bytes(job, a, 1, 0).await?;
        tx.record_outcome(job, RoundNumber(1), &accepted("a", 1))
            .await?;
        tx.end_job(job, JobState::Succeeded, "", T).await?;
    });
    let parts = tx!(datastore, |tx| tx.job_silos(job).await?);
    assert_eq!(
        (parts[0].bytes_up, parts[0].bytes_down, parts[0].accepted),
        (11, 200, 1)
    );
    // Who has declined may have worked before, and has to hear of the end to keep its model.
    assert_eq!((seen(a, T).await, seen(b, T).await), (1, 1));
    let later = T + Duration::from_millis(1);
    assert_eq!((seen(a, later).await, seen(b, later).await), (0, 0));
}

pub(super) async fn jobs_of_a_silo_are_cut_to_the_newest_ended_ones_and_never_leave_out_a_running_one(
    datastore: &Datastore,
) {
    let a = &silo("a");
    for index in 0..6 {
        let name = format!("j{index}");
        let (job, round) = (&new_job(&name), &new_round(&name, 1, &["a"]));
        tx!(datastore, |tx| {
            let id = &job.job_id;
            tx.insert_job(job).await?;
            tx.start_job(id, version("base"), T).await?;
            tx.add_job_silos(id, [a]).await?;
            tx.insert_round(round).await?;
            tx.set_job_round(id, RoundNumber(1)).await?;
            // The first one goes on.
            if index > 0 {
                tx.end_job(id, JobState::Succeeded, "", T).await?;
            }
        });
    }
    for (ended, expected) in [
        (2, vec!["j0", "j4", "j5"]),
        (0, vec!["j0"]),
        (9, vec!["j0", "j1", "j2", "j3", "j4", "j5"]),
    ] {
        let jobs = tx!(datastore, |tx| tx.notices_of_silo(a, T, ended).await?);
        let names: Vec<_> = jobs.iter().map(|job| job.job_id.as_str()).collect();
        assert_eq!(names, expected);
    }
}
