//! The metrics as a table.

use std::fmt::Write as _;

use crate::{gallery::arm_name, machine::Summary};

/// One row for every arm of every iteration.
pub(super) fn table(history: &[Summary]) -> String {
    let mut text =
        "iteration,arm,score,gain,gain_low,gain_high,pairs,left_out,win_rate,alignment,diversity,raw_gain,kept,cut,ties,nearest,nearest_base,near\n".to_owned();
    let number = |value: Option<f64>| value.map_or_else(String::new, |value| format!("{value:.6}"));
    for summary in history {
        let raw_gain = number(summary.raw_gain.map(|gain| gain.mean));
        for (arm, result) in &summary.arms {
            let _ = writeln!(
                text,
                "{},{},{:.6},{:.6},{:.6},{:.6},{},{},{:.4},{},{},{raw_gain},{},{},{},{},{},{}",
                summary.iteration,
                arm_name(*arm),
                result.score,
                result.gain.mean,
                result.gain.low,
                result.gain.high,
                result.gain.pairs,
                result.left_out,
                result.wins.rate(),
                number(result.alignment),
                number(result.diversity),
                summary.kept,
                result.cut,
                result.wins.ties,
                number(result.nearest.map(|it| it.arm)),
                number(result.nearest.map(|it| it.base)),
                number(result.nearest.map(|it| it.near)),
            );
        }
    }
    text
}
