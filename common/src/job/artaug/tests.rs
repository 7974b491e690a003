use proptest::prelude::*;

use std::time::Duration;

use super::*;

const MINIMAL: &str = r#"
kind = "artaug"
name = "first"

[model]
folder = "icons-64"

[prompts]
texts = ["red apple", "blue car"]

[held_out]
texts = ["green tree"]

[advisor]
kind = "rules"

[scorers]
filter = [{ kind = "photometry" }]
evaluation = [{ kind = "statistics" }]

[counts]
iterations = 3
pairs = 288
kept = 48
held_out = 200
"#;

const SAMPLE: &str = include_str!("../../../../deploy/artaug/job.toml");

fn refusal(text: &str) -> String {
    let refusal = ArtaugSpec::parse(text).unwrap_err();
    assert_eq!(refusal.code, ErrorCode::InvalidJobSpec);
    refusal.message
}

fn changed(from: &str, to: &str) -> String {
    assert!(MINIMAL.contains(from), "{from}");
    MINIMAL.replace(from, to)
}

#[test]
fn a_minimal_specification_gets_the_defaults() {
    let spec = ArtaugSpec::parse(MINIMAL).unwrap();
    assert_eq!(spec.lora.rank, 8);
    assert_eq!(spec.sampler.steps, 20);
    assert_eq!(spec.scorers.judge(), "statistics");
    assert_eq!(spec.scorers.guard, Guard::Alignment);
    assert!(spec.evaluation.control && !spec.review);
    assert_eq!(spec.limits.time, Duration::from_hours(24));
}

#[test]
fn the_sample_is_read_and_shows_every_setting() {
    let spec = ArtaugSpec::parse(SAMPLE).unwrap();
    assert_eq!(
        ArtaugSpec::parse(&spec.to_toml().unwrap()),
        Ok(spec.clone())
    );
    // Every key of the specification stands in the sample, if only in a comment.
    let value = toml::Table::try_from(&spec).unwrap();
    for (section, content) in &value {
        assert!(SAMPLE.contains(section), "{section}");
        for (key, _) in content.as_table().into_iter().flatten() {
            assert!(SAMPLE.contains(&format!("{key} = ")), "{section}.{key}");
        }
    }
}

#[test]
fn the_defaults_in_the_sample_are_the_defaults() {
    let (sample, minimal) = (
        ArtaugSpec::parse(SAMPLE).unwrap(),
        ArtaugSpec::parse(MINIMAL).unwrap(),
    );
    assert_eq!(sample.sampler, minimal.sampler);
    assert_eq!(sample.lora, minimal.lora);
    assert_eq!(sample.evaluation, minimal.evaluation);
    assert_eq!(sample.limits, minimal.limits);
    assert_eq!(sample.output, minimal.output);
    assert_eq!(sample.advisor, minimal.advisor);
}

#[test]
fn the_chat_settings_in_the_comments_of_the_sample_are_read() {
    let commented: Vec<&str> = SAMPLE
        .lines()
        .skip_while(|line| *line != "# [advisor]")
        .take_while(|line| line.starts_with('#'))
        .map(|line| line.trim_start_matches("# "))
        .filter(|line| line.starts_with('[') || line.contains(" = "))
        .collect();
    let section = commented.join("\n") + "\n";
    let spec = ArtaugSpec::parse(&changed("[advisor]\nkind = \"rules\"\n", &section)).unwrap();
    assert!(
        matches!(
            spec.advisor,
            AdvisorSpec::Chat {
                boxes: Boxes::Thousand,
                ..
            }
        ),
        "{section}"
    );
}

#[test]
fn an_unknown_key_is_named() {
    for (text, key) in [
        (format!("{MINIMAL}\n[lora]\nrnk = 1"), "rnk"),
        (format!("{MINIMAL}\n[limits]\nmemory = 1"), "memory"),
        (
            changed("kind = \"rules\"", "kind = \"rules\"\nurl = \"http://x\""),
            "url",
        ),
        (
            changed(
                "{ kind = \"photometry\" }",
                "{ kind = \"photometry\", weight = 2 }",
            ),
            "weight",
        ),
        (
            changed("{ kind = \"statistics\" }", "{ kind = \"photometry\" }"),
            "photometry",
        ),
        (changed("name = \"first\"", "nam = \"first\""), "nam"),
        (
            changed("kind = \"artaug\"", "kind = \"federated-training\""),
            "federated-training",
        ),
    ] {
        assert!(refusal(&text).contains(key), "{}", refusal(&text));
    }
}

#[test]
fn a_value_that_cannot_be_is_refused_with_its_key() {
    for (from, to, key) in [
        ("name = \"first\"", "name = \"\"", "`name`"),
        ("name = \"first\"", "name = \"x\"\nseed = -1", "seed"),
        (
            "folder = \"icons-64\"",
            "folder = \"../secrets\"",
            "model.folder",
        ),
        ("folder = \"icons-64\"", "folder = \"/etc\"", "model.folder"),
        ("folder = \"icons-64\"", "folder = \"\"", "model.folder"),
        (
            "texts = [\"green tree\"]",
            "file = \"a/../../b\"",
            "held_out.file",
        ),
        ("texts = [\"green tree\"]", "", "held_out"),
        (
            "texts = [\"green tree\"]",
            "texts = [\"a\"]\nfile = \"b\"",
            "held_out",
        ),
        (
            "texts = [\"green tree\"]",
            "texts = [\"red apple\"]",
            "red apple",
        ),
        (
            "texts = [\"green tree\"]",
            "texts = [\"a\", \"a\"]",
            "twice",
        ),
        (
            "texts = [\"green tree\"]",
            "texts = [\"a\\nb\"]",
            "held_out.texts",
        ),
        (
            "kind = \"rules\"",
            "kind = \"rules\"\nmax_regions = 0",
            "advisor.max_regions",
        ),
        (
            "kind = \"rules\"",
            "kind = \"rules\"\ntail = nan",
            "advisor.tail",
        ),
        (
            "kind = \"rules\"",
            "kind = \"rules\"\nsubject_below = 1.5",
            "advisor.subject_below",
        ),
        ("[{ kind = \"photometry\" }]", "[]", "scorers.filter"),
        ("[{ kind = \"statistics\" }]", "[]", "scorers.evaluation"),
        (
            "[{ kind = \"statistics\" }]",
            "[{ kind = \"statistics\" }]\njudge = \"taste\"",
            "scorers.judge",
        ),
        (
            "[{ kind = \"photometry\" }]",
            "[{ kind = \"colour\" }, { kind = \"colour\" }]",
            "colour",
        ),
        ("iterations = 3", "iterations = 0", "counts.iterations"),
        ("kept = 48", "kept = 289", "counts.kept"),
        (
            "kept = 48",
            "kept = 48\nleast_kept = 49",
            "counts.least_kept",
        ),
        ("held_out = 200", "held_out = 1", "counts.held_out"),
    ] {
        let message = refusal(&changed(from, to));
        assert!(message.contains(key), "{to}: {message}");
    }
}

#[test]
fn a_section_that_cannot_be_is_refused_with_its_key() {
    for (section, key) in [
        ("[sampler]\nsteps = 0", "sampler.steps"),
        (
            "[sampler]\nkind = \"dpm-solver\"\nsteps = 1000",
            "`sampler.steps`: must be from 1 to 999",
        ),
        ("[sampler]\nguidance = inf", "sampler.guidance"),
        (
            "[sampler]\nguidance = 1\nnegative_prompt = \"blur\"",
            "sampler.negative_prompt",
        ),
        ("[sampler]\nsize = [512, 500]", "sampler.size"),
        (
            "[sampler]\nsize = [2048, 2048]\nbatch = 17",
            "`sampler.batch`: must be lower",
        ),
        (
            "[sampler]\nregion_strength = 0.0",
            "sampler.region_strength",
        ),
        ("[lora]\nrank = 0", "lora.rank"),
        ("[lora]\nlearning_rate = 0.0", "lora.learning_rate"),
        // What the trainer refuses is refused here.
        ("[lora]\nlearning_rate = 1.0", "lora.learning_rate"),
        ("[lora]\nlearning_rate = nan", "lora.learning_rate"),
        ("[lora]\nmode = \"per-pair\"", "lora.batch"),
        ("[lora]\nreduced_rank = 0", "lora.reduced_rank"),
        ("[evaluation]\nconfidence = 1.0", "evaluation.confidence"),
        ("[limits]\nleast_diversity = 1.5", "limits.least_diversity"),
        ("[limits]\ntime = \"0s\"", "limits.time"),
        ("[limits]\ndisk = \"1 kB\"", "limits.disk"),
        ("[limits]\nthreads = 0", "limits.threads"),
    ] {
        let message = refusal(&format!("{MINIMAL}\n{section}"));
        assert!(message.contains(key), "{section}: {message}");
    }
}

#[test]
fn a_joined_lora_of_too_high_a_rank_is_refused() {
    let with = |lora: &str| format!("{MINIMAL}\n[lora]\n{lora}");
    assert!(ArtaugSpec::parse(&with("rank = 1024")).is_ok());
    let each = "batch = 1\nmode = \"per-pair\"\n";
    assert!(ArtaugSpec::parse(&with(&format!("{each}rank = 56"))).is_ok());
    let message = refusal(&with(&format!("{each}rank = 57")));
    assert!(
        message.contains("lora.rank") && message.contains("rank 8208 after 3 iterations of 48"),
        "{message}"
    );
}

#[test]
fn an_arithmetic_in_which_nothing_can_be_trained_is_refused() {
    let with = |precision: &str| {
        changed(
            "folder = \"icons-64\"",
            &format!("folder = \"icons-64\"\nprecision = \"{precision}\""),
        )
    };
    assert!(ArtaugSpec::parse(&with("bf16")).is_ok());
    assert!(refusal(&with("f16")).contains("model.precision"));
}

#[test]
fn a_review_of_more_pairs_than_can_be_listed_is_refused() {
    let many = changed("pairs = 288\nkept = 48", "pairs = 20000\nkept = 10001");
    assert!(ArtaugSpec::parse(&many).is_ok());
    let reviewed = many.replace("name = \"first\"", "name = \"first\"\nreview = true");
    assert!(refusal(&reviewed).contains("counts.kept"));
}

#[test]
fn a_scorer_of_the_filter_cannot_judge() {
    let filter = "[{ kind = \"chat\", name = \"a\", endpoint = \"e\", model = \"m\", criterion = \"c\" }, { kind = \"brisque\" }]";
    let with = |evaluation: &str| {
        let text = changed("[{ kind = \"photometry\" }]", filter);
        text.replace("{ kind = \"statistics\" }", evaluation)
    };
    assert!(refusal(&with("{ kind = \"brisque\" }")).contains("cannot judge"));
    let same_model =
        "{ kind = \"chat\", name = \"b\", endpoint = \"e\", model = \"m\", criterion = \"d\" }";
    assert!(refusal(&with(same_model)).contains("cannot judge"));
    assert!(ArtaugSpec::parse(&with(&same_model.replace("\"m\"", "\"n\""))).is_ok());
    let shadow = same_model
        .replace("\"b\"", "\"alignment\"")
        .replace("\"m\"", "\"n\"");
    assert!(refusal(&with(&shadow)).contains("built-in"));
}

/// The minimal job with a chat scorer in the filter and another as the judge, and what their tables say besides.
fn with_chat_scorers(filter: &str, evaluation: &str) -> String {
    let scorer = |name: &str, more: &str| {
        format!(
            "{{ kind = \"chat\", name = \"{name}\", endpoint = \"e\", model = \"{name}\", criterion = \"c\"{more} }}"
        )
    };
    changed("{ kind = \"photometry\" }", &scorer("chooser", filter))
        .replace("{ kind = \"statistics\" }", &scorer("judge", evaluation))
}

#[test]
fn a_chat_scorer_may_say_how_it_is_asked() {
    let asked = ", tries = 1, max_tokens = 32768, schema = false, least_side = 2048";
    let spec = ArtaugSpec::parse(&with_chat_scorers(asked, asked)).unwrap();
    assert!(matches!(
        spec.scorers.filter.as_slice(),
        [FilterScorer::Chat {
            tries: Some(1),
            max_tokens: Some(32_768),
            schema: Some(false),
            least_side: Some(2048),
            ..
        }]
    ));
    assert!(matches!(
        spec.scorers.evaluation.as_slice(),
        [EvaluationScorer::Chat {
            tries: Some(1),
            max_tokens: Some(32_768),
            schema: Some(false),
            least_side: Some(2048),
            ..
        }]
    ));
    assert_eq!(ArtaugSpec::parse(&spec.to_toml().unwrap()), Ok(spec));
}

#[test]
fn a_chat_scorer_that_does_not_say_how_it_is_asked_is_written_as_before_it_could() {
    let spec = ArtaugSpec::parse(&with_chat_scorers("", "")).unwrap();
    let text = spec.to_toml().unwrap();
    for key in ["tries", "max_tokens", "schema", "least_side"] {
        assert!(!text.contains(key), "{key}: {text}");
    }
}

#[test]
fn how_a_model_is_asked_has_the_same_bounds_for_scores_as_for_advice() {
    for asked in [
        "tries = 0",
        "tries = 11",
        "max_tokens = 15",
        "max_tokens = 32769",
        "least_side = 0",
        "least_side = 2049",
    ] {
        let (key, _) = asked.split_once(' ').unwrap();
        let (in_table, chat) = (
            format!(", {asked}"),
            format!("kind = \"chat\"\nendpoint = \"e\"\nmodel = \"m\"\nboxes = \"pixel\"\n{asked}"),
        );
        for (text, section) in [
            (with_chat_scorers(&in_table, ""), "scorers.filter"),
            (with_chat_scorers("", &in_table), "scorers.evaluation"),
            (changed("kind = \"rules\"", &chat), "advisor"),
        ] {
            let message = refusal(&text);
            assert!(
                message.contains(&format!("`{section}.{key}`: must be from")),
                "{asked}: {message}"
            );
        }
    }
}

#[test]
fn paths_that_leave_their_folder_are_told() {
    for path in ["a", "a/b.txt", "a b/c-1"] {
        assert!(stays_below(path), "{path}");
    }
    for path in ["", "/a", "..", "a/../b", "./a", "a\0", "a\\b", "~/../x"] {
        assert!(!stays_below(path), "{path}");
    }
}

proptest! {
    #[test]
    fn hostile_texts_never_crash_the_reader(text in ".{0,200}", at in 0_usize..500, byte in "[ -~]") {
        let _ = ArtaugSpec::parse(&text);
        let mut changed = MINIMAL.to_owned();
        let place = at % changed.len();
        if changed.is_char_boundary(place) {
            changed.insert_str(place, &byte);
        }
        let _ = ArtaugSpec::parse(&changed);
    }
}

#[test]
fn an_interval_takes_seconds_at_most() {
    let with = |resamples: &str, held_out: &str| {
        let text = SAMPLE
            .replace("resamples = 2000", resamples)
            .replace("held_out = 200", held_out);
        assert!(text.contains(resamples) && text.contains(held_out));
        ArtaugSpec::parse(&text)
    };
    with("resamples = 1000000", "held_out = 200").unwrap();
    let refusal = with("resamples = 1000000", "held_out = 10000")
        .unwrap_err()
        .to_string();
    assert!(
        refusal.contains("evaluation.resamples") && refusal.contains("10000 scores"),
        "{refusal}"
    );
}
