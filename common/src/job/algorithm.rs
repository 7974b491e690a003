//! How a silo trains: the algorithms with their settings.

use serde::{Deserialize, Serialize};

/// How a silo trains, with the settings of that way.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "lowercase", deny_unknown_fields)]
pub enum AlgorithmSpec {
    /// No exchange: one private adapter; for `simulate` only.
    Local {},
    /// x <- sum p_k w_k (arXiv 1602.05629); with a private head this is FedPer (1912.00818).
    Fedavg {},
    /// FedAvg with (mu/2)||w - x||^2 in the local loss (1812.06127).
    Fedprox {
        /// Strength of the proximal term.
        #[serde(default = "default_prox_mu")]
        mu: f64,
    },
    /// Model-contrastive learning on representations (2103.16257).
    Moon {
        /// Strength of the contrastive term.
        #[serde(default = "one")]
        mu: f64,
        /// Temperature.
        #[serde(default = "half")]
        tau: f64,
    },
    /// A personal model pulled towards the global one (2012.04221).
    Ditto {
        /// Strength of the pull.
        #[serde(default = "default_ditto_lambda")]
        lambda: f64,
    },
    /// The head first with the rest frozen, then the rest with the head frozen (2102.07078).
    Fedrep {
        /// Epochs for the head in each round.
        #[serde(default = "one_epoch")]
        head_epochs: u32,
    },
    /// Two adapters under a contrastive loss (2409.00116): L = CE + alpha R_g + mu L_con; mu = 0 is the ablation.
    Fedmcp {
        /// Strength of the contrastive term.
        #[serde(default = "one")]
        mu: f64,
        /// Temperature of the contrastive term.
        #[serde(default = "half")]
        tau: f64,
        /// Strength of the global adapter's regularisation.
        #[serde(default = "default_alpha")]
        alpha: f64,
        /// What R_g is.
        #[serde(default)]
        regulariser: Regulariser,
        /// Which estimator of HSIC the CKA uses.
        #[serde(default)]
        cka: CkaEstimator,
    },
}

/// R_g, the regularisation of the global adapter.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Regulariser {
    /// Cross-entropy of the global-only path.
    GlobalLoss,
    /// (1/2)||w_g - w_g^t||^2
    #[default]
    Distance,
}

/// Estimator of HSIC inside CKA.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CkaEstimator {
    /// Song et al. 2012; usable at batch size; needs 4 rows.
    #[default]
    Unbiased,
    /// Kornblith et al. 2019; near 1 for any two random adapters at batch size.
    Biased,
}

impl AlgorithmSpec {
    /// The name as in the specification.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Local {} => "local",
            Self::Fedavg {} => "fedavg",
            Self::Fedprox { .. } => "fedprox",
            Self::Moon { .. } => "moon",
            Self::Ditto { .. } => "ditto",
            Self::Fedrep { .. } => "fedrep",
            Self::Fedmcp { .. } => "fedmcp",
        }
    }
}

fn one() -> f64 {
    1.0
}
fn half() -> f64 {
    0.5
}
fn default_prox_mu() -> f64 {
    0.01
}
fn default_ditto_lambda() -> f64 {
    0.1
}
fn default_alpha() -> f64 {
    0.01
}
fn one_epoch() -> u32 {
    1
}
