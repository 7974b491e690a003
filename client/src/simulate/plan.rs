//! Which job is simulated: a specification, with an algorithm or a seed in place of its own.

use concord_common::{
    ErrorCode,
    code::Refusal,
    job::{AlgorithmSpec, JobSpec},
};

/// What is run.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The job's specification, TOML.
    pub spec_toml: String,
    /// In place of the job's algorithm, with its default settings.
    pub algorithm: Option<String>,
    /// In place of the job's seed.
    pub seed: Option<u64>,
}

impl Plan {
    /// The specification with what is replaced, as TOML. Untouched text stays as it is.
    ///
    /// # Errors
    /// `INVALID_JOB_SPEC`.
    pub fn spec(&self) -> Result<String, Refusal> {
        let spec = JobSpec::parse(&self.spec_toml)?;
        let JobSpec::FederatedTraining(mut training) = spec;
        let mut changed = false;
        if let Some(name) = &self.algorithm
            && training.algorithm.name() != name
        {
            training.algorithm = algorithm(name)?;
            changed = true;
        }
        if let Some(seed) = self.seed {
            training.seed = seed;
            changed = true;
        }
        if !changed {
            return Ok(self.spec_toml.clone());
        }
        let text = JobSpec::FederatedTraining(training).to_toml()?;
        JobSpec::parse(&text)?;
        Ok(text)
    }
}

/// An algorithm with its default settings.
fn algorithm(name: &str) -> Result<AlgorithmSpec, Refusal> {
    toml::Table::from_iter([("name".to_owned(), toml::Value::String(name.to_owned()))])
        .try_into()
        .map_err(|error: toml::de::Error| {
            Refusal::new(
                ErrorCode::InvalidJobSpec,
                format!("there is no algorithm `{name}`: {}", error.message()),
            )
        })
}
