//! A small run of the load generator: many silos at once, and the result to the bit.

use concord_integration_tests::load::{Load, run};

/// Largest message in bytes that gRPC takes unless told otherwise; the server's default bound is half of it.
const GRPC_LIMIT: f64 = 4.0 * 1024.0 * 1024.0;

fn small(durability: &str, parameters: u64) -> Load {
    Load {
        silos: 12,
        parameters,
        rounds: 2,
        durability: durability.to_owned(),
    }
}

#[test]
fn twelve_silos_at_once_give_the_weighted_mean_of_adapters_larger_than_a_message_to_the_bit() {
    let load = small("process", 1_500_000);
    let report = super::runtime().block_on(run(&load)).unwrap();
    assert!(report.ok, "{report:?}");
    assert!(report.model_mb * 1e6 > GRPC_LIMIT, "{report:?}");
    assert_eq!(report.wall_s_all.len(), 2);
    assert!(report.server_peak_rss_mb < 100.0, "{report:?}");
}

#[test]
fn the_same_holds_when_every_receipt_waits_for_the_disk() {
    let load = small("power", 20_000);
    let report = super::runtime().block_on(run(&load)).unwrap();
    assert!(report.ok, "{report:?}");
}
