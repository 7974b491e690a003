//! The parts of the page.

use std::fmt::Write as _;

use base64::{Engine as _, engine::general_purpose::STANDARD};

use super::{HeldOutView, PairView, arm_cells, arm_name, escape, interval, other_scores};
use crate::{
    image::{Image, ImageError},
    machine::{Decision, Summary},
};

/// Colours by region, in turn.
const COLOURS: [&str; 6] = [
    "#d1495b", "#2a6f97", "#edae49", "#3d8361", "#7b4b94", "#c05299",
];

pub(super) const STYLE: &str = "
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --good: #2e7d4f; --bad: #b3403f; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 72rem; padding: 1.5rem; }
h1 { font-size: 1.6rem; margin: 0 0 .5rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
p.note { margin: .2rem 0; max-width: 60rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .4rem 0 1rem; }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(23rem, 1fr)); gap: 1rem; }
.card { border: 1px solid var(--line); border-radius: .5rem; padding: .8rem; background: var(--soft); overflow-wrap: anywhere; }
.card h3 { font-size: .95rem; margin: 0 0 .5rem; }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(4.4rem, 1fr)); gap: .6rem; } figure { margin: 0; max-width: 11rem; }
figcaption { font-size: .8rem; opacity: .8; } .frame { position: relative; line-height: 0; }
.frame img { width: 100%; image-rendering: pixelated; border-radius: .2rem; }
.frame svg { position: absolute; inset: 0; width: 100%; height: 100%; }
ol, ul { margin: .4rem 0; padding-left: 1.3rem; font-size: .85rem; } .small { font-size: .82rem; opacity: .85; margin: .4rem 0; }
.kept { color: var(--good); font-weight: 600; } .rejected { color: var(--bad); font-weight: 600; }
details { font-size: .82rem; } pre { white-space: pre-wrap; max-height: 12rem; overflow: auto; }
";

pub(super) fn heading(page: &mut String, title: &str, notes: &[String]) {
    let _ = writeln!(page, "<h1>{}</h1>", escape(title));
    for note in notes {
        let _ = writeln!(page, "<p class=\"note\">{}</p>", escape(note));
    }
}

pub(super) fn iterations(page: &mut String, summaries: &[Summary]) {
    page.push_str("<h2>Iterations</h2>\n<table><tr><th>iteration</th><th>raw gain</th><th>kept</th><th>rejected</th><th>unusable answers</th><th>then</th></tr>\n");
    for summary in summaries {
        let gain = summary
            .raw_gain
            .map_or_else(|| "not measured".to_owned(), |gain| interval(&gain));
        let rejected: Vec<String> = summary
            .rejected
            .iter()
            .map(|(reason, count)| format!("{count} {reason}"))
            .collect();
        let then = match &summary.decision {
            Decision::Continue => "the next iteration".to_owned(),
            Decision::Stop { keep, reason } => format!("stop, keeping iteration {keep}: {reason}"),
        };
        let _ = writeln!(
            page,
            "<tr><td>{}</td><td>{gain}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
            summary.iteration,
            summary.kept,
            escape(&rejected.join(", ")),
            summary.rejected_replies,
            escape(&then),
        );
    }
    page.push_str(
        "</table>\n<h2>Held-out prompts, against the base at equal seeds, solver and steps</h2>\n<p class=\"small\">Prompt rewriting needs the base's image and \
         an answer about it first.</p>\n",
    );
    page.push_str("<table><tr><th>iteration</th><th>arm</th><th>score</th><th>gain (interval)</th><th>win rate</th><th>ties</th><th>pairs left out</th><th>alignment</th><th>diversity</th><th>nearest X' (the base's; near)</th></tr>\n");
    for summary in summaries {
        for (arm, result) in &summary.arms {
            let _ = write!(
                page,
                "<tr><td>{}</td><td>{}</td>",
                summary.iteration,
                arm_name(*arm)
            );
            for cell in arm_cells(result) {
                let _ = write!(page, "<td>{cell}</td>");
            }
            page.push_str("</tr>\n");
        }
    }
    page.push_str("</table>\n");
    others(page, summaries);
}

fn others(page: &mut String, summaries: &[Summary]) {
    let rows = other_scores(summaries);
    if rows.is_empty() {
        return;
    }
    page.push_str("<p class=\"small\">Evaluation scorers that decide nothing:</p>\n<table><tr><th>iteration</th><th>arm</th><th>scorer</th><th>score</th><th>gain (interval)</th><th>prompts</th></tr>\n");
    for row in rows {
        let cells = row.map(|cell| format!("<td>{}</td>", escape(&cell)));
        let _ = writeln!(page, "<tr>{}</tr>", cells.concat());
    }
    page.push_str("</table>\n");
}

/// The title of pictures, and how many of how many there are where some are left out.
fn title(page: &mut String, title: &str, shown: usize, total: usize) {
    let _ = writeln!(page, "<h2>{title}</h2>");
    if shown < total {
        let _ = writeln!(page, "<p class=\"small\">showing {shown} of {total}</p>");
    }
}

pub(super) fn held_out(
    page: &mut String,
    views: &[HeldOutView],
    total: usize,
) -> Result<(), ImageError> {
    if views.is_empty() {
        return Ok(());
    }
    title(
        page,
        "Held-out prompts, before and after",
        views.len(),
        total,
    );
    page.push_str("<div class=\"cards\">\n");
    for view in views {
        let _ = writeln!(
            page,
            "<div class=\"card\"><h3>{}</h3><div class=\"row\">",
            escape(&view.prompt)
        );
        for (name, image, score) in &view.images {
            let caption = if score.is_finite() {
                format!("{name}, {score:.3}")
            } else {
                format!("{name}, no score")
            };
            figure(page, image, "", &caption)?;
        }
        let _ = writeln!(
            page,
            "</div><p class=\"small\">held-out image {}</p></div>",
            view.number
        );
    }
    page.push_str("</div>\n");
    Ok(())
}

pub(super) fn pairs(
    page: &mut String,
    name: &str,
    views: &[&PairView],
    total: usize,
) -> Result<(), ImageError> {
    if views.is_empty() {
        return Ok(());
    }
    title(page, name, views.len(), total);
    page.push_str("<div class=\"cards\">\n");
    for view in views {
        pair(page, view)?;
    }
    page.push_str("</div>\n");
    Ok(())
}

pub(super) fn pair(page: &mut String, view: &PairView) -> Result<(), ImageError> {
    let _ = writeln!(
        page,
        "<div class=\"card\"><h3>{}</h3><div class=\"row\">",
        escape(&view.prompt)
    );
    figure(page, &view.base, "", "base")?;
    if !view.regions.is_empty() {
        figure(page, &view.base, &boxes(view), "advice")?;
    }
    if let Some(enhanced) = &view.enhanced {
        figure(page, enhanced, "", "enhanced")?;
    }
    page.push_str("</div>\n");
    if !view.regions.is_empty() {
        page.push_str("<ol>\n");
        for (region, colour) in view.regions.iter().zip(COLOURS.iter().cycle()) {
            let _ = writeln!(
                page,
                "<li><span style=\"color:{colour}\">&#9632;</span> {} <span class=\"small\">({:.2})</span></li>",
                escape(region.prompt.as_str()),
                region.confidence
            );
        }
        page.push_str("</ol>\n");
    }
    let (class, word) = if view.kept {
        ("kept", "kept")
    } else {
        ("rejected", "rejected")
    };
    let _ = writeln!(
        page,
        "<p class=\"small\"><span class=\"{class}\">{word}</span> {}</p>",
        escape(&view.verdict)
    );
    let scores: Vec<String> = view
        .scores
        .iter()
        .map(|(name, before, after)| format!("{} {before:.3} to {after:.3}", escape(name)))
        .collect();
    let _ = writeln!(
        page,
        "<p class=\"small\">iteration {}, item {}{}{}</p>",
        view.iteration,
        view.item,
        if scores.is_empty() { "" } else { "; " },
        scores.join("; ")
    );
    for reply in &view.rejected_replies {
        let _ = writeln!(
            page,
            "<details><summary>unusable answer: {}</summary><pre>{}</pre></details>",
            escape(&reply.reason),
            escape(&reply.raw.chars().take(2000).collect::<String>())
        );
    }
    page.push_str("</div>\n");
    Ok(())
}

/// The advice as frames in a drawing that lies over the image.
fn boxes(view: &PairView) -> String {
    let mut drawing =
        "<svg viewBox=\"0 0 100 100\" preserveAspectRatio=\"none\" aria-hidden=\"true\">"
            .to_owned();
    for (region, colour) in view.regions.iter().zip(COLOURS.iter().cycle()) {
        let [left, top, right, bottom] = region.area.edges().map(|edge| edge * 100.0);
        // White below the colour, so that the frame stands out from any picture.
        for (stroke, width) in [("#fff", 5), (*colour, 3)] {
            let _ = write!(
                drawing,
                "<rect x=\"{left:.2}\" y=\"{top:.2}\" width=\"{:.2}\" height=\"{:.2}\" fill=\"none\" stroke=\"{stroke}\" \
                 stroke-width=\"{width}\" vector-effect=\"non-scaling-stroke\"/>",
                right - left,
                bottom - top
            );
        }
    }
    drawing.push_str("</svg>");
    drawing
}

pub(super) fn figure(
    page: &mut String,
    image: &Image,
    over: &str,
    caption: &str,
) -> Result<(), ImageError> {
    let png = STANDARD.encode(image.to_png()?);
    let caption = escape(caption);
    let _ = writeln!(
        page,
        "<figure><div class=\"frame\"><img alt=\"{caption}\" src=\"data:image/png;base64,{png}\">{over}</div><figcaption>{caption}</figcaption></figure>"
    );
    Ok(())
}

pub(super) fn costs(page: &mut String, costs: &[(String, String)]) {
    if costs.is_empty() {
        return;
    }
    page.push_str("<h2>Cost</h2>\n<table>\n");
    for (name, value) in costs {
        let _ = writeln!(
            page,
            "<tr><td>{}</td><td>{}</td></tr>",
            escape(name),
            escape(value)
        );
    }
    page.push_str("</table>\n");
}
