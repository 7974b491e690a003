//! Loss curves as SVG.

use std::fmt::Write as _;

use super::{Curve, escape, page::figure};
use crate::image::ImageError;

const WIDTH: f64 = 520.0;
const HEIGHT: f64 = 150.0;
/// Most points of a line; longer curves are averaged in groups.
const MOST_POINTS: usize = 260;

pub(super) fn curves(page: &mut String, curves: &[Curve]) -> Result<(), ImageError> {
    let drawable: Vec<(&Curve, Vec<f64>)> = curves
        .iter()
        .map(|curve| (curve, points(&curve.losses)))
        .filter(|(_, points)| points.len() > 1)
        .collect();
    if drawable.is_empty() {
        return Ok(());
    }
    page.push_str("<h2>Losses</h2>\n<div class=\"cards\">\n");
    for (curve, points) in drawable {
        let lowest = points.iter().copied().fold(f64::INFINITY, f64::min);
        let highest = points.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let span = (highest - lowest).max(f64::MIN_POSITIVE);
        let step = WIDTH / (points.len() - 1) as f64;
        let line: Vec<String> = points
            .iter()
            .enumerate()
            .map(|(index, loss)| {
                let y = 4.0 + (1.0 - (loss - lowest) / span) * (HEIGHT - 8.0);
                format!("{:.1},{y:.1}", index as f64 * step)
            })
            .collect();
        let _ = writeln!(
            page,
            "<div class=\"card\"><h3>{}</h3><svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"100%\" role=\"img\">\
             <polyline points=\"{}\" fill=\"none\" stroke=\"#2a6f97\" stroke-width=\"2\"/></svg>\
             <p class=\"small\">{} steps, highest {highest:.4}, lowest {lowest:.4}{}</p>",
            escape(&curve.name),
            line.join(" "),
            curve.losses.len(),
            ends(&curve.losses)
        );
        samples(page, curve)?;
        page.push_str("</div>\n");
    }
    page.push_str("</div>\n");
    Ok(())
}

/// The means of the first and the last tenth, which tell how far a loss has fallen where single steps are too noisy to.
fn ends(losses: &[f64]) -> String {
    let losses = finite(losses);
    let tenth = losses.len() / 10;
    if tenth == 0 {
        return String::new();
    }
    format!(
        "; mean of the first tenth {:.4}, of the last {:.4}",
        mean(&losses[..tenth]),
        mean(&losses[losses.len() - tenth..])
    )
}

fn mean(losses: &[f64]) -> f64 {
    losses.iter().sum::<f64>() / losses.len() as f64
}

fn finite(losses: &[f64]) -> Vec<f64> {
    let losses = losses.iter().copied();
    losses.filter(|loss| loss.is_finite()).collect()
}

/// What was drawn on the way, a row each time.
fn samples(page: &mut String, curve: &Curve) -> Result<(), ImageError> {
    let shown = curve.samples.len();
    if shown < curve.sampled {
        let _ = writeln!(
            page,
            "<p class=\"small\">samples: showing {shown} of {}</p>",
            curve.sampled
        );
    }
    for (step, images) in &curve.samples {
        page.push_str("<div class=\"row\">\n");
        for image in images {
            figure(page, image, "", &format!("step {step}"))?;
        }
        page.push_str("</div>\n");
    }
    Ok(())
}

/// The finite losses, averaged in equal groups if there are many.
fn points(losses: &[f64]) -> Vec<f64> {
    let finite = finite(losses);
    let group = finite.len().div_ceil(MOST_POINTS).max(1);
    finite.chunks(group).map(mean).collect()
}
