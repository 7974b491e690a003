//! A small run of the load generator: many silos at once, and the result to the bit.

use concord_integration_tests::load::{Load, run};

fn small(durability: &str) -> Load {
    Load {
        silos: 12,
        parameters: 20_000,
        rounds: 2,
        durability: durability.to_owned(),
    }
}

#[test]
fn twelve_silos_at_once_give_the_weighted_mean_to_the_bit() {
    let report = super::runtime().block_on(run(&small("process"))).unwrap();
    assert!(report.ok, "{report:?}");
    assert_eq!(report.wall_s_all.len(), 2);
    assert!(report.server_peak_rss_mb < 100.0, "{report:?}");
}

#[test]
fn the_same_holds_when_every_receipt_waits_for_the_disk() {
    let report = super::runtime().block_on(run(&small("power"))).unwrap();
    assert!(report.ok, "{report:?}");
}
