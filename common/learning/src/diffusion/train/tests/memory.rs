//! What a way back needs, measured in a process of its own: in this one other tests are at work.

use std::{fs, process::Command};

use concord_common::telemetry::{peak_rss_bytes, rss_bytes};

use super::*;
use crate::torch::use_threads;

/// Says in the environment of the other process whether it checkpoints.
const CHECKPOINTS: &str = "CONCORD_TEST_CHECKPOINTS";

/// Bytes that one way back took at its peak, beyond what was held before it.
fn taken_by_a_way_back(checkpointing: bool) -> u64 {
    use_threads(1);
    let (_folder, mut model) = model();
    model.set_checkpointing(checkpointing);
    drop(trainer(&mut model, "one"));
    let leaves = lora_leaves(model.sites(), "one");
    let leaves: Vec<&Tensor> = leaves.values().collect();
    let condition = model.condition(&["a red fox"; 4]).unwrap();
    let times = Tensor::from_slice(&[951_i64, 420, 7, 1]);
    let pull = |side: usize| {
        let sample = testing::values("input.sample", &[4, 4, side, side], 1.7, Kind::Float);
        model
            .predict_and_pull(&sample, &times, &condition, &leaves, &mut |output| {
                Ok(output * 2.0)
            })
            .unwrap()
    };
    // What is made once, at the first call, is no part of it.
    pull(16);
    // See proc_pid_clear_refs(5).
    fs::write("/proc/self/clear_refs", "5").unwrap();
    let before = rss_bytes().unwrap();
    pull(64);
    peak_rss_bytes().unwrap() - before
}

fn measured(checkpointing: bool) -> u64 {
    let (_, module) = module_path!().split_once("::").unwrap();
    let test = format!("{module}::a_way_back_with_checkpoints_needs_less_memory");
    let output = Command::new(std::env::current_exe().unwrap())
        .args([test.as_str(), "--exact", "--nocapture"])
        .env(CHECKPOINTS, checkpointing.to_string())
        // What is freed goes back to the system at once, so that it is not counted twice.
        .env("MALLOC_MMAP_THRESHOLD_", "65536")
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let taken = text
        .lines()
        .find_map(|line| line.split_once("taken ")?.1.parse().ok());
    taken.unwrap_or_else(|| panic!("{text}"))
}

#[test]
fn a_way_back_with_checkpoints_needs_less_memory() {
    if let Ok(own) = std::env::var(CHECKPOINTS) {
        println!("\ntaken {}", taken_by_a_way_back(own == "true"));
        return;
    }
    let (plain, lean) = (measured(false), measured(true));
    println!("a way back takes {plain} bytes, {lean} with checkpoints");
    assert!(4 * lean < 3 * plain, "{plain} {lean}");
}
