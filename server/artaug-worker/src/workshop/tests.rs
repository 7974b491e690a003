use std::path::Path;

use super::*;

/// The sample, whose advisor and scorers are all built in.
const SAMPLE: &str = include_str!("../../../../deploy/artaug/job.toml");

fn spec() -> ArtaugSpec {
    ArtaugSpec::parse(SAMPLE).unwrap()
}

#[test]
fn a_job_that_measures_needs_clean_drawings() {
    let error = clean(&spec(), &DataSection::default(), 32).unwrap_err();
    assert!(error.to_string().contains("data.icons"), "{error}");
    let nowhere = DataSection {
        icons: Some("/nonexistent".into()),
        ..DataSection::default()
    };
    assert!(clean(&spec(), &nowhere, 32).is_err());
}

#[test]
fn a_job_whose_advisor_and_scorers_are_elsewhere_needs_none() {
    let mut spec = spec();
    spec.advisor = AdvisorSpec::Chat {
        endpoint: "vision".to_owned(),
        model: "m".to_owned(),
        boxes: concord_common::job::artaug::Boxes::Fraction,
        max_regions: 4,
        tries: 1,
        temperature: 0.0,
        max_tokens: 100,
        schema: false,
        least_side: 1,
    };
    spec.scorers.filter = vec![FilterScorer::Brisque { least_gain: 0.0 }];
    spec.scorers.evaluation = vec![EvaluationScorer::Brisque {}];
    assert!(clean(&spec, &DataSection::default(), 32).is_ok());
}

#[test]
fn what_this_worker_lacks_is_told_with_the_key_to_set() {
    let bare = Trained::new(&DataSection::default());
    let text = bare.alignment_guard().err().unwrap().to_string();
    assert!(text.contains("data.image_text"), "{text}");
    let text = bare.brisque_filter().err().unwrap().to_string();
    assert!(text.contains("data.brisque"), "{text}");
}

#[test]
fn a_model_outside_the_allowed_folders_is_refused() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (inside, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    std::os::unix::fs::symlink(outside.path(), inside.path().join("link")).unwrap();
    let config = |folder: &Path| -> WorkerConfig {
        let text = format!(
            "state_dir = \"/s\"\n[server]\naddress = \"localhost:1\"\n[tls]\ncertificate = \"a\"\nkey = \"b\"\nca = \"c\"\n[allowed]\nmodel_folders = [{:?}]",
            folder.display().to_string()
        );
        toml::from_str(&text).unwrap()
    };
    let workshop = TorchWorkshop::new(config(inside.path()), runtime.handle().clone());
    for name in ["link", "other"] {
        let mut spec = spec();
        spec.model.folder = name.to_owned();
        let refused = workshop.parts(&spec);
        let text = refused.unwrap_err().to_string();
        assert!(text.contains("not below"), "{text}");
    }
}
