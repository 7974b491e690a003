//! From a closed round to the next one: aggregate on a worker thread, then publish and go on in one transaction.

use std::{collections::BTreeMap, fs::File, sync::Arc, time::Instant};

use concord_common::{
    adapter::AdapterVersion,
    aggregate::{AggregateError, Aggregation, Strategy, Update},
    job::TrainingSpec,
    round::{Event, Outcome, Round},
};

use crate::{
    context::Context,
    datastore::{RoundSiloRecord, VersionRecord},
    decide,
    error::Failure,
    metrics,
    spool::UploadId,
};

/// Aggregates a round and publishes the result, together with the job's next step. If the contributions cannot be
/// aggregated the job fails; a fault of the disk is an error, to be tried again.
pub(super) async fn publish(context: &Arc<Context>, round: &Round) -> Result<(), Failure> {
    let job_id = &round.spec().job;
    let number = round.spec().number;
    let (job, silos) = context
        .datastore
        .run_read("load_contributions", |tx| {
            Box::pin(async move {
                Ok::<_, Failure>((
                    decide::job(tx, job_id).await?,
                    tx.round_silos(job_id, number).await?,
                ))
            })
        })
        .await?;
    let spec = decide::spec(&job)?;
    let contributions = round.accepted();
    let started = Instant::now();
    let aggregated = {
        let shared = Arc::clone(context);
        let base = round.spec().base;
        context
            .long_work(move || aggregate(&shared, &spec, base, &silos))
            .await?
    };
    let (event, stored) = match aggregated {
        Ok(stored) => (
            Event::Aggregated {
                version: stored.version,
            },
            Some(stored),
        ),
        Err(Broken::Contributions(reason)) => (Event::AggregationFailed { reason }, None),
        Err(Broken::Server(failure)) => return Err(failure),
    };
    let took = started.elapsed();
    metrics::aggregation_seconds(took);
    tracing::info!(
        job.id = %job_id, round.id = %number, contributions, ?took, "round aggregated"
    );

    let now = context.now();
    let (event, signer) = (&event, &context.signer);
    let (change, files) = context
        .datastore
        .run_tx("publish_round", |tx| {
            Box::pin(async move {
                let mut change =
                    decide::apply(tx, signer, job_id, number, event.clone(), None, now).await?;
                // Nothing is published if the job was cancelled in the meantime.
                if let (Some(_), Some(stored)) = (change.published, stored) {
                    let version = VersionRecord {
                        round: number.0,
                        version: stored.version,
                        payload_bytes: stored.payload_bytes,
                        created_at: now,
                    };
                    tx.insert_version(job_id, &version).await?;
                    tx.set_job_version(job_id, stored.version).await?;
                }
                decide::step(tx, job_id, &mut change, now).await?;
                let files = tx.release_contributions().await?;
                Ok::<_, Failure>((change, files))
            })
        })
        .await?;
    if let Some(stored) = stored {
        context.blobs.settled(&stored.version.0);
    }
    change.announce(job_id, &context.hub);
    delete_files(context, files).await;
    Ok(())
}

/// A stored adapter.
#[derive(Clone, Copy)]
struct Stored {
    version: AdapterVersion,
    payload_bytes: u64,
}

/// Why there is no aggregate.
enum Broken {
    /// The round's contributions are to blame; one sentence.
    Contributions(String),
    /// The server is to blame.
    Server(Failure),
}

fn aggregate(
    context: &Context,
    spec: &TrainingSpec,
    base: AdapterVersion,
    silos: &[RoundSiloRecord],
) -> Result<Stored, Broken> {
    let server = |what: &'static str| {
        move |source| {
            Broken::Server(Failure::Io {
                what: what.to_owned(),
                source,
            })
        }
    };
    let layout = spec
        .adapter_shape()
        .layout()
        .map_err(|refusal| Broken::Server(refusal.into()))?;
    let base = context
        .blobs
        .get(&base.0)
        .map_err(server("cannot open the round's base adapter"))?;
    let mut deltas: Vec<(&RoundSiloRecord, File)> = Vec::new();
    for silo in silos
        .iter()
        .filter(|silo| silo.outcome == Some(Outcome::Accepted))
    {
        // The database demands one for every accepted contribution.
        let Some(id) = silo.upload_id else { continue };
        let file =
            File::open(context.spool.path(&id)).map_err(server("cannot open a contribution"))?;
        deltas.push((silo, file));
    }
    let updates: BTreeMap<_, _> = deltas
        .iter()
        .map(|(silo, file)| {
            let update = Update {
                examples: silo.examples,
                delta: file,
            };
            (silo.silo_id.clone(), update)
        })
        .collect();
    let work = Aggregation {
        layout: &layout,
        base: &base,
        updates,
    };
    let mut writer = context
        .blobs
        .create()
        .map_err(server("cannot store an aggregate"))?;
    let result = Strategy::of(&spec.rounds)
        .aggregator()
        .aggregate(&work, &mut writer)
        .map_err(|error| match error {
            AggregateError::Read { ref source, .. } | AggregateError::Write(ref source) => {
                let source = std::io::Error::new(source.kind(), source.to_string());
                Broken::Server(Failure::Io {
                    what: error.to_string(),
                    source,
                })
            }
            other => Broken::Contributions(other.to_string()),
        })?;
    let payload_bytes = writer
        .finish(&result.version.0)
        .map_err(server("cannot store an aggregate"))?;
    tracing::debug!(step_norm = result.step_norm, update_norms = ?result.update_norms, "aggregate computed");
    Ok(Stored {
        version: result.version,
        payload_bytes,
    })
}

/// Deletes contributions that nothing refers to any more. What cannot be deleted now is swept at the next start.
pub(super) async fn delete_files(context: &Arc<Context>, files: Vec<UploadId>) {
    let spool = Arc::clone(&context.spool);
    let deleted = tokio::task::spawn_blocking(move || {
        for id in files {
            if let Err(error) = spool.delete(&id) {
                tracing::warn!(%error, "cannot delete a contribution that is no longer needed");
            }
        }
    })
    .await;
    if let Err(error) = deleted {
        tracing::warn!(%error, "a worker thread broke off");
    }
}
