mod advice;
mod samples;

use std::collections::BTreeMap;

use concord_common::{Timestamp, clock::MockClock};
use proptest::prelude::*;

use super::*;
use crate::{
    advisor::RegionPrompt,
    folder::JobFolder,
    losses,
    machine::{Decision, Event, Machine, OtherScore, Plan, StopReason, Work, testing},
    region::Area,
    stats::{Interval, Wins},
};

fn picture(shade: u8) -> Image {
    let mut image = Image::filled(24, 24, [shade, 140, 200]).unwrap();
    for y in 6..18 {
        for x in 6..18 {
            image.put(x, y, [220, shade / 2, 60]);
        }
    }
    image
}

fn pair(item: u32, kept: bool) -> PairView {
    let region = |edges: [f64; 4], prompt: &str| Region {
        area: Area::try_from(edges).unwrap(),
        prompt: RegionPrompt::new(prompt).unwrap(),
        confidence: 0.7,
    };
    PairView {
        iteration: 1,
        item,
        prompt: "red apple, blue background".to_owned(),
        base: picture(60),
        enhanced: Some(picture(120)),
        regions: vec![
            region([0.0, 0.5, 0.5, 1.0], "red apple, well lit"),
            region([0.25, 0.0, 1.0, 0.5], "red apple, colourful"),
        ],
        rejected_replies: vec![RejectedReply {
            raw: "<img src=x onerror=alert(1)>".to_owned(),
            code: "no-json".to_owned(),
            reason: "the answer holds no JSON".to_owned(),
        }],
        scores: vec![("photometry".to_owned(), -0.8, -0.1)],
        kept,
        verdict: "the gain is 1.2 spreads".to_owned(),
    }
}

fn summary(iteration: u32) -> Summary {
    let interval = Interval {
        mean: 0.12,
        low: 0.08,
        high: 0.16,
        pairs: 200,
    };
    let arm = ArmSummary {
        score: -3.1,
        gain: interval,
        wins: Wins {
            wins: 150,
            ties: 10,
            losses: 40,
        },
        left_out: 0,
        cut: 0,
        alignment: Some(0.31),
        diversity: Some(0.28),
        nearest: None,
        behind: None,
        others: BTreeMap::from([(
            "grace <b>".to_owned(),
            OtherScore {
                score: 0.625,
                gain: interval,
            },
        )]),
    };
    Summary {
        iteration,
        raw_gain: Some(interval),
        kept: 48,
        rejected: [("little-gain".to_owned(), 200)].into(),
        rejected_replies: 3,
        arms: BTreeMap::from([(Arm::Base, arm.clone()), (Arm::Enhanced, arm)]),
        decision: if iteration == 1 {
            Decision::Continue
        } else {
            Decision::Stop {
                keep: 2,
                reason: StopReason::Maximum,
            }
        },
    }
}

fn sample() -> Gallery {
    Gallery {
        title: "icons, first try".to_owned(),
        notes: vec!["The base model is small and its weaknesses are planted.".to_owned()],
        iterations: vec![summary(1), summary(2)],
        advice: AdviceCounts::default(),
        pairs: vec![pair(0, true), pair(1, false), pair(2, true)],
        held_out: vec![HeldOutView {
            prompt: "green tree".to_owned(),
            number: 7,
            images: vec![
                ("base".to_owned(), picture(50), -3.4),
                ("enhanced".to_owned(), picture(150), -2.9),
            ],
        }],
        totals: Totals {
            kept: 48,
            rejected: 1,
            held_out: 200,
        },
        curves: vec![Curve {
            name: "LoRA_1, iteration 1".to_owned(),
            losses: (0..1000)
                .map(|step| 1.0 / (1.0 + f64::from(step) / 50.0))
                .collect(),
            samples: vec![
                (500, vec![picture(10), picture(20)]),
                (1000, vec![picture(30)]),
            ],
            sampled: 9,
        }],
        costs: vec![("forward passes".to_owned(), "12,345".to_owned())],
    }
}

/// The page's tags that open and close, in order, must nest.
fn check_nesting(html: &str) {
    let mut open = Vec::new();
    for part in html.split('<').skip(1) {
        let tag: String = part
            .chars()
            .take_while(|c| c.is_ascii_alphanumeric() || "/!".contains(*c))
            .collect();
        match tag.strip_prefix('/') {
            Some(name) => assert_eq!(
                open.pop().as_deref(),
                Some(name),
                "{}",
                &part[..part.len().min(80)]
            ),
            None if tag.starts_with('!') || ["meta", "img", "input"].contains(&tag.as_str()) => {}
            None if part.split('>').next().unwrap().ends_with('/') => {}
            None => open.push(tag),
        }
    }
    assert_eq!(open, Vec::<String>::new());
}

#[test]
fn the_page_shows_every_part_and_stands_alone() {
    let html = sample().to_html().unwrap();
    check_nesting(&html);
    for text in [
        "icons, first try",
        "planted",
        "Kept pairs",
        "Rejected pairs",
        "green tree",
        "LoRA_1, iteration 1",
        "12,345",
        "little-gain",
        "78 %",
        "stop, keeping iteration 2",
        "well lit",
        "held-out image 7",
        "+0.120 (+0.080 to +0.160)",
        "<td>grace &lt;b&gt;</td><td>0.625</td><td>+0.120 (+0.080 to +0.160)</td><td>200</td>",
        "showing 2 of 48<",
        "showing 1 of 200<",
        "samples: showing 2 of 9<",
        "<figcaption>step 1000</figcaption>",
    ] {
        assert!(html.contains(text), "{text}");
    }
    // Nothing is said of what is shown whole.
    assert_eq!(html.matches(">showing ").count(), 2);
    assert_eq!(html.matches("<figcaption>step 500</figcaption>").count(), 2);
    assert!(html.contains("<rect x=\"0.00\" y=\"50.00\" width=\"50.00\" height=\"50.00\""));
    let without_names = html.replace("http-equiv", "");
    assert!(!without_names.contains("http") && !html.contains("<script") && !html.contains("href"));
}

#[test]
fn the_review_page_makes_up_the_line_to_be_typed_without_a_script() {
    let page = ReviewPage::new("job-7f", 2, vec![pair(3, true), pair(12, true)]).unwrap();
    let html = page.to_html().unwrap();
    check_nesting(&html);
    assert!(html.contains("concord artaug review job-7f<span class=\"word\"> --accept "));
    for item in [3, 12] {
        for letter in ['a', 'r'] {
            let id = format!("{letter}{item}");
            assert!(
                html.contains(&format!("id=\"{id}\"")) && html.contains(&format!("for=\"{id}\""))
            );
        }
        // Both buttons of a pair share a name, so that one of them alone can be chosen.
        assert_eq!(html.matches(&format!("name=\"p{item}\"")).count(), 2);
        assert!(html.contains(&format!(
            "<span class=\"comma\">,</span><span class=\"number\">{item}</span>"
        )));
    }
    assert!(
        !html.contains("<script") && !html.contains("href") && html.contains("default-src 'none'")
    );
    for job in ["", "-rf", "a b", "a;reboot", "a$(x)", "a\nb"] {
        assert!(ReviewPage::new(job, 1, vec![]).is_err(), "{job}");
    }
}

/// A job whose images are real and stored, so that pages can be made of it.
fn job_with_images(folder: &std::path::Path, review: bool) -> JobFolder {
    job_with_images_until(folder, review, |_| false)
}

/// The same, up to a moment between two pieces of work.
fn job_with_images_until(
    folder: &std::path::Path,
    review: bool,
    stop: fn(&Machine) -> bool,
) -> JobFolder {
    let plan = Plan {
        review,
        ..testing::plan()
    };
    let clock = std::sync::Arc::new(MockClock::new(Timestamp(5)));
    let mut job = JobFolder::open(folder, plan, testing::specification(), 1 << 20, clock).unwrap();
    while !matches!(job.machine().work(), Work::Done | Work::Review(_)) && !stop(job.machine()) {
        for mut event in testing::GOOD.act(job.machine()) {
            let item = event_item(&event);
            let mut put = |shade: u8| {
                job.store_mut()
                    .put(&picture(shade).to_png().unwrap())
                    .unwrap()
            };
            match &mut event {
                Event::Generated { result, .. } => result.image = put(item),
                // Item 3 comes out as it was.
                Event::Regenerated { result, .. } => {
                    result.image = put(if item == 3 { item } else { 100 + item });
                }
                Event::Evaluated { result, .. } => result.image = put(200 + item),
                Event::Trained { result, .. } => {
                    let packed = losses::pack(&[2.0, 1.0, 0.5]);
                    result.losses = job.store_mut().put(&packed).unwrap();
                }
                _ => {}
            }
            job.record(&event).unwrap();
        }
    }
    job
}

fn event_item(event: &Event) -> u8 {
    match event {
        Event::Generated { item, .. }
        | Event::Regenerated { item, .. }
        | Event::Evaluated { item, .. } => *item as u8,
        _ => 0,
    }
}

#[test]
fn a_jobs_gallery_shows_pairs_by_reason_held_out_images_and_every_curve() {
    let folder = tempfile::tempdir().unwrap();
    let job = job_with_images(folder.path(), false);
    let extent = Extent {
        kept: 2,
        held_out: 8,
        ..Extent::default()
    };
    let mut fetch = |digest| job.store().get(digest).ok();
    let gallery = Gallery::of_job(&job, "icons", vec![], extent, &mut fetch).unwrap();
    let totals = Totals {
        kept: 3 * 3,
        rejected: 3 * 3,
        held_out: 8,
    };
    assert_eq!(gallery.totals, totals);
    let kept = gallery.pairs.iter().filter(|pair| pair.kept).count();
    let rejected: Vec<&str> = gallery
        .pairs
        .iter()
        .filter(|pair| !pair.kept && pair.iteration == 2)
        .map(|pair| pair.verdict.as_str())
        .collect();
    assert_eq!(kept, 3 * 2);
    assert_eq!(
        rejected,
        [
            "the image did not change",
            "nothing to improve",
            "no usable advice"
        ]
    );
    assert_eq!(gallery.held_out.len(), 8);
    let names: Vec<&str> = gallery.held_out[0]
        .images
        .iter()
        .map(|(name, ..)| name.as_str())
        .collect();
    assert_eq!(
        names,
        [
            "base",
            "after iteration 3",
            "plain LoRA",
            "prompt rewriting alone"
        ]
    );
    assert_eq!(gallery.curves.len(), 9);
    assert_eq!(gallery.curves[0].name, "LoRA_1 on X, iteration 1");
    check_nesting(&gallery.to_html().unwrap());
    // What cannot be had is left out, and the page still stands.
    let bare = Gallery::of_job(&job, "icons", vec![], extent, &mut |_| None).unwrap();
    assert!(bare.pairs.is_empty() && bare.held_out.is_empty() && bare.curves.is_empty());
    check_nesting(&bare.to_html().unwrap());
}

#[test]
fn the_review_page_of_a_job_shows_the_pairs_that_wait() {
    let folder = tempfile::tempdir().unwrap();
    let job = job_with_images(folder.path(), true);
    let mut fetch = |digest| job.store().get(digest).ok();
    let html = ReviewPage::of_job(&job, "job-1", Extent::default(), &mut fetch)
        .unwrap()
        .to_html()
        .unwrap();
    for item in 0..6 {
        assert_eq!(
            html.contains(&format!("id=\"a{item}\"")),
            job.machine().kept().contains(&item),
            "{item}"
        );
    }
    assert!(html.contains("3 pairs wait for a word"));
    // Two pairs of pictures of 24 x 24 fit: each shows the base twice.
    let extent = Extent {
        pixels: 2 * 3 * 24 * 24 * 3,
        ..Extent::default()
    };
    let bounded = ReviewPage::of_job(&job, "job-1", extent, &mut fetch)
        .unwrap()
        .to_html()
        .unwrap();
    check_nesting(&bounded);
    assert!(bounded.contains("2 of the 3 pairs that wait for a word are shown"));
    assert_eq!(bounded.matches(">accept</label>").count(), 2);
    assert_eq!(html.matches(">accept</label>").count(), 3);
}

#[test]
fn a_gallery_between_iterations_shows_what_the_finished_ones_draw() {
    let folder = tempfile::tempdir().unwrap();
    let job = job_with_images_until(folder.path(), false, |machine| machine.iteration() == 3);
    let mut fetch = |digest| job.store().get(digest).ok();
    let extent = Extent::default();
    let gallery = Gallery::of_job(&job, "icons", vec![], extent, &mut fetch).unwrap();
    for view in &gallery.held_out {
        let names: Vec<&str> = view.images.iter().map(|(name, ..)| name.as_str()).collect();
        assert_eq!(
            names,
            ["base", "after iteration 2", "prompt rewriting alone"]
        );
    }
    assert_eq!(gallery.held_out.len(), 8);
}

#[test]
fn a_gallery_says_that_the_filter_sees_the_guard() {
    let folder = tempfile::tempdir().unwrap();
    let mut plan = testing::plan();
    plan.filter.least_gain.insert("fit".to_owned(), 0.0);
    let clock = std::sync::Arc::new(MockClock::new(Timestamp(5)));
    let job = JobFolder::open(
        folder.path(),
        plan,
        testing::specification(),
        1 << 20,
        clock,
    )
    .unwrap();
    let extent = Extent::default();
    let gallery = Gallery::of_job(&job, "icons", vec![], extent, &mut |_| None).unwrap();
    assert!(
        gallery
            .to_html()
            .unwrap()
            .contains("The filter sees the guard too")
    );
}

#[test]
fn an_empty_gallery_is_a_page_all_the_same() {
    let html = Gallery::default().to_html().unwrap();
    check_nesting(&html);
    assert!(!html.contains("<h2>"));
}

#[test]
fn a_curve_of_nothing_finite_is_left_out() {
    let mut page = String::new();
    let curve = |losses: Vec<f64>| Curve {
        name: "x".to_owned(),
        losses,
        samples: Vec::new(),
        sampled: 0,
    };
    chart::curves(
        &mut page,
        &[curve(vec![]), curve(vec![1.0]), curve(vec![f64::NAN; 9])],
    )
    .unwrap();
    assert_eq!(page, "");
    chart::curves(&mut page, &[curve(vec![2.0, f64::INFINITY, 2.0])]).unwrap();
    assert!(page.contains("polyline") && !page.contains("NaN"));
    assert!(!page.contains("tenth"));
    let mut losses = vec![3.0, 1.0];
    losses.extend([7.0; 17]);
    losses.extend([f64::NAN, 0.25, 0.75]);
    chart::curves(&mut page, &[curve(losses)]).unwrap();
    assert!(
        page.contains("mean of the first tenth 2.0000, of the last 0.5000"),
        "{page}"
    );
}

proptest! {
    #[test]
    fn hostile_texts_stay_texts(text in "\\PC{0,40}|[<>\"'&/a-z =(){};!-]{0,60}") {
        let mut gallery = sample();
        gallery.title.clone_from(&text);
        gallery.pairs[0].prompt.clone_from(&text);
        gallery.pairs[1].verdict.clone_from(&text);
        gallery.pairs[2].rejected_replies[0].raw.clone_from(&text);
        gallery.pairs[2].scores[0].0.clone_from(&text);
        gallery.held_out[0].images[0].0.clone_from(&text);
        gallery.curves[0].name.clone_from(&text);
        gallery.costs[0].1 = text;
        check_nesting(&gallery.to_html().unwrap());
    }
}
