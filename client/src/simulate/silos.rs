//! Where a simulation's silos come from: a file that lists them, a folder of tasks, or the daemons' own configurations.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use concord_common::{
    SiloId,
    config::{self, ConfigError},
};
use concord_learning::{cache::CacheSettings, data::InputKind};
use serde::Deserialize;

use crate::{
    config::{
        BackboneEntry, CacheSection, ClientConfig, Files, ProblemKind, SettingsError, TaskConfig,
        TorchSection, settle_data,
    },
    data::{Columns, Format},
};

/// Silos that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SilosError {
    /// A settings file cannot be used.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// A file or folder cannot be read.
    #[error("{}: {source}", .path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// A list of tasks cannot be understood, or contradicts another.
    #[error("{}: {reason}", .path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

impl From<ConfigError> for SilosError {
    fn from(error: ConfigError) -> Self {
        Self::Settings(error.into())
    }
}

/// The silos of a simulation.
#[derive(Debug, Clone)]
pub struct SimulatedSilos {
    /// Each silo's task.
    pub tasks: BTreeMap<SiloId, TaskConfig>,
    /// The backbones that all of them share.
    pub backbones: Vec<BackboneEntry>,
    /// Threads of one libtorch operation.
    pub threads: usize,
    /// The prefix cache of all silos together.
    pub cache: CacheSettings,
}

/// `silos.toml`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct SilosFile {
    #[serde(default)]
    torch: TorchSection,
    #[serde(default)]
    cache: CacheSection,
    #[serde(default, rename = "backbone")]
    backbones: Vec<BackboneEntry>,
    #[serde(rename = "silo")]
    silos: Vec<SiloEntry>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct SiloEntry {
    id: SiloId,
    task: TaskConfig,
}

/// `tasks.json` of `deploy/demo/tasks.py`, as far as it matters here.
#[derive(Debug, Deserialize)]
struct TasksFile {
    tasks: Vec<ListedTask>,
}

#[derive(Debug, Deserialize)]
struct ListedTask {
    name: SiloId,
    kind: InputKind,
    problem: ProblemKind,
}

impl SimulatedSilos {
    /// From a file `silos.toml`, or from a folder with `tasks.json` and `<task>/{train,validation,test}.csv`, where each task is
    /// a silo of the same name.
    ///
    /// # Errors
    /// [`SilosError`] naming the file.
    pub fn read(path: &Path) -> Result<Self, SilosError> {
        if path.is_dir() {
            return Self::from_folder(path);
        }
        let mut file: SilosFile = config::load(Some(path), Vec::new())?;
        let folder = path.parent().unwrap_or(Path::new(""));
        file.torch.check()?;
        let tasks = file.silos.iter_mut().map(|silo| &mut silo.task);
        settle_data(folder, &mut file.cache, &mut file.backbones, tasks)?;
        let mut silos = Self {
            tasks: BTreeMap::new(),
            backbones: file.backbones,
            threads: file.torch.threads,
            cache: file.cache.settings(),
        };
        for silo in file.silos {
            silos.add(path, silo.id, silo.task)?;
        }
        Ok(silos)
    }

    /// From daemons' configurations, by silo. Threads and cache are the first one's; the task is the one named `task`.
    ///
    /// # Errors
    /// [`SilosError`] naming the file.
    pub fn from_daemons(configs: &[(SiloId, PathBuf)], task: &str) -> Result<Self, SilosError> {
        let mut silos = Self {
            tasks: BTreeMap::new(),
            backbones: Vec::new(),
            threads: TorchSection::default().threads,
            cache: CacheSettings::default(),
        };
        for (place, (silo, path)) in configs.iter().enumerate() {
            let config = ClientConfig::load(path, Vec::new())?;
            if place == 0 {
                silos.threads = config.torch.threads;
                silos.cache = config.cache.settings();
                silos.cache.memory_bytes = silos
                    .cache
                    .memory_bytes
                    .saturating_mul(configs.len() as u64);
            }
            for backbone in &config.backbones {
                if !silos
                    .backbones
                    .iter()
                    .any(|known| known.name == backbone.name)
                {
                    silos.backbones.push(backbone.clone());
                }
            }
            let found = config.tasks.into_iter().find(|entry| entry.name == task);
            let entry = found.ok_or_else(|| SilosError::Content {
                path: path.clone(),
                reason: format!("there is no task `{task}`"),
            })?;
            silos.add(path, silo.clone(), entry)?;
        }
        Ok(silos)
    }

    fn from_folder(folder: &Path) -> Result<Self, SilosError> {
        let list = folder.join("tasks.json");
        let bytes = fs::read(&list).map_err(|source| SilosError::Io {
            path: list.clone(),
            source,
        })?;
        let file: TasksFile =
            serde_json::from_slice(&bytes).map_err(|error| SilosError::Content {
                path: list.clone(),
                reason: error.to_string(),
            })?;
        let mut silos = Self {
            tasks: BTreeMap::new(),
            backbones: Vec::new(),
            threads: TorchSection::default().threads,
            cache: CacheSection::default().settings(),
        };
        silos.cache.memory_bytes = silos
            .cache
            .memory_bytes
            .saturating_mul(file.tasks.len() as u64);
        for listed in file.tasks {
            let here = folder.join(listed.name.as_str());
            let pair = listed.kind == InputKind::Pair;
            let task = TaskConfig {
                name: listed.name.to_string(),
                kind: listed.kind,
                problem: listed.problem,
                format: Format::Csv,
                delimiter: ',',
                columns: Columns {
                    text: if pair { "text_a" } else { "text" }.to_owned(),
                    text_b: pair.then(|| "text_b".to_owned()),
                    label: "label".to_owned(),
                },
                files: Files::PerSplit {
                    train: here.join("train.csv"),
                    validation: here.join("validation.csv"),
                    test: here.join("test.csv"),
                },
                max_bad_rows: 0,
            };
            silos.add(&list, listed.name, task)?;
        }
        Ok(silos)
    }

    fn add(&mut self, path: &Path, silo: SiloId, task: TaskConfig) -> Result<(), SilosError> {
        let twice = format!("silo `{silo}` is listed twice");
        match self.tasks.insert(silo, task) {
            None => Ok(()),
            Some(_) => Err(SilosError::Content {
                path: path.to_path_buf(),
                reason: twice,
            }),
        }
    }
}
