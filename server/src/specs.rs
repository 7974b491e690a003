//! The specifications of the jobs that silos asked about last. A job's specification never changes, and every call of a round
//! would otherwise read it anew.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
};

use concord_common::{JobId, adapter::AdapterLayout, job::TrainingSpec};

use crate::{datastore::JobRecord, decide, error::Failure};

/// Jobs that are remembered: what runs side by side.
const JOBS: usize = 16;

/// A job's specification and what follows from it.
#[derive(Debug)]
pub struct KnownSpec {
    /// As it was submitted.
    pub spec: TrainingSpec,
    /// The tensors that travel.
    pub layout: AdapterLayout,
}

/// The specifications that were read last.
#[derive(Debug, Default)]
pub struct RecentSpecs {
    jobs: Mutex<VecDeque<(JobId, Arc<KnownSpec>)>>,
}

impl RecentSpecs {
    /// The specification of a stored job.
    ///
    /// # Errors
    /// If it can no longer be read.
    pub(crate) fn of(&self, job: &JobRecord) -> Result<Arc<KnownSpec>, Failure> {
        self.get(&job.job_id, || decide::spec(job))
    }

    fn get(
        &self,
        job_id: &JobId,
        read: impl FnOnce() -> Result<TrainingSpec, Failure>,
    ) -> Result<Arc<KnownSpec>, Failure> {
        if let Some(known) = self.known(job_id) {
            return Ok(known);
        }
        let spec = read()?;
        let layout = spec.adapter_shape().layout()?;
        let known = Arc::new(KnownSpec { spec, layout });
        let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        jobs.truncate(JOBS - 1);
        jobs.push_front((job_id.clone(), Arc::clone(&known)));
        Ok(known)
    }

    /// The specification of a job that was asked about lately.
    pub(crate) fn known(&self, job_id: &JobId) -> Option<Arc<KnownSpec>> {
        let jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        let (_, known) = jobs.iter().find(|(known, _)| known == job_id)?;
        Some(Arc::clone(known))
    }
}

#[cfg(test)]
mod tests {
    use concord_common::job::JobSpec;

    use super::*;

    fn read(recent: &RecentSpecs, index: usize) -> Arc<KnownSpec> {
        let text = format!(
            "kind = \"federated-training\"\nname = \"a\"\ntask = \"none\"\nsilos = [\"a\"]\n\
             backbone = {{ name = \"none\", hidden = 4, layers = 1 }}\nadapter = {{ bottleneck = {} }}\n\
             algorithm = {{ name = \"fedavg\" }}\nrounds = {{ count = 1, min_silos = 1, max_time = \"1m\" }}\n",
            index + 1
        );
        let spec = JobSpec::parse(&text).unwrap().training().clone();
        recent.get(&job(index), || Ok(spec)).unwrap()
    }

    fn job(index: usize) -> JobId {
        format!("job-{index}").parse().unwrap()
    }

    #[test]
    fn a_specification_is_read_once_and_goes_when_others_come() {
        let recent = RecentSpecs::default();
        let first = read(&recent, 0);
        assert_eq!(first.layout, first.spec.adapter_shape().layout().unwrap());
        assert!(Arc::ptr_eq(&first, &read(&recent, 0)));
        for index in 1..=JOBS {
            assert_ne!(read(&recent, index).layout, first.layout);
        }
        assert!(recent.known(&job(0)).is_none());
        assert!(recent.known(&job(1)).is_some());
    }
}
