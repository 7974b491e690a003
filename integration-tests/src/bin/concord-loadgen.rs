//! Measures what a round costs when training is taken out. See `docs/benchmarks.md`.

use clap::{Parser, ValueEnum};
use concord_integration_tests::load::{Load, run};

/// Starts a concord-server (built beside this program) and N silos over mutual TLS on loopback. Every silo downloads the
/// adapter, adds a constant of its own and uploads; R rounds are timed after one that is not. Prints one line of JSON.
#[derive(Debug, Parser)]
#[command(name = "concord-loadgen", version)]
struct Arguments {
    /// Silos
    #[arg(value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    silos: u32,
    /// Elements of the adapter (f32), at least; over 100 tensors
    #[arg(value_name = "P", value_parser = clap::value_parser!(u64).range(1000..=250_000_000))]
    parameters: u64,
    /// Timed rounds
    #[arg(value_name = "R", value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// What a receipt survives
    #[arg(long, value_enum, default_value_t = Durability::Power)]
    durability: Durability,
}

/// The server's setting.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Durability {
    /// A power cut: fsync before the receipt
    Power,
    /// A crash of the server
    Process,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let load = Load {
        silos: arguments.silos,
        parameters: arguments.parameters,
        rounds: arguments.rounds,
        durability: match arguments.durability {
            Durability::Power => "power".to_owned(),
            Durability::Process => "process".to_owned(),
        },
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    let report = runtime.block_on(run(&load))?;
    println!("{}", serde_json::to_string(&report)?);
    anyhow::ensure!(report.ok, "the result is not the weighted mean");
    Ok(())
}
