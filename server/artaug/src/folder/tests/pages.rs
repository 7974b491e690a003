//! The files that are made for people and other tools.

use super::*;

#[test]
fn the_manifest_lines_of_an_iteration_are_complete() {
    let folder = tempfile::tempdir().unwrap();
    go_on(&mut open(folder.path()).unwrap(), |machine| {
        machine.stage() == Stage::TrainFirst
    });
    let text = std::fs::read_to_string(folder.path().join("manifest-1.jsonl")).unwrap();
    let lines: Vec<ManifestLine> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines.len(), 6);
    assert!(lines.iter().all(|line| line.verdict.is_some()));
}

#[test]
fn every_held_out_image_has_a_line_in_the_iteration_that_drew_it() {
    let folder = tempfile::tempdir().unwrap();
    go_on(&mut open(folder.path()).unwrap(), |_| false);
    let lines = |iteration: u32| -> Vec<serde_json::Value> {
        let path = folder.path().join(format!("held-out-{iteration}.jsonl"));
        let text = std::fs::read_to_string(path).unwrap();
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    };
    let arms = |iteration| -> BTreeSet<String> {
        let lines = lines(iteration).into_iter();
        lines
            .map(|line| line["arm"].as_str().unwrap().to_owned())
            .collect()
    };
    let drawn = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    let all: BTreeSet<String> = drawn(&["base", "enhanced", "plain-lora", "rewriting"]);
    assert_eq!(arms(1), all);
    assert_eq!(arms(2), drawn(&["enhanced", "plain-lora"]));
    assert_eq!((lines(1).len(), lines(3).len()), (4 * 8, 2 * 8));
    let line = &lines(2)[3];
    assert_eq!((&line["iteration"], &line["item"]), (&2.into(), &3.into()));
    assert_eq!(
        (&line["seed"], &line["prompt"]),
        (&3.into(), &"held out 3".into())
    );
    assert!(line["scores"]["judge"].is_number(), "{line}");
}

#[test]
fn the_table_has_a_row_for_every_arm() {
    let folder = tempfile::tempdir().unwrap();
    go_on(&mut open(folder.path()).unwrap(), |_| false);
    let table = std::fs::read_to_string(folder.path().join("metrics.csv")).unwrap();
    assert_eq!(table.lines().count(), 1 + 3 * 4);
    assert!(
        table.lines().all(|line| line.split(',').count() == 18),
        "{table}"
    );
    assert!(
        table
            .lines()
            .next()
            .unwrap()
            .ends_with(",cut,ties,nearest,nearest_base,near"),
        "{table}"
    );
    let last = |arm| {
        let row = table.lines().find(|line| line.contains(arm)).unwrap();
        row.split(',').skip(13).collect::<Vec<_>>()
    };
    assert_eq!(last(",prompt rewriting")[0], "3");
    // The base is no better and no worse than itself, and nothing was trained.
    assert_eq!(last(",base"), ["0", "8", "", "", ""]);
    assert_eq!(last(",enhanced")[2..], ["0.100000", "0.200000", "0.300000"]);
}
