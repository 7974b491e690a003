//! The operator's command line: `concord job submit spec.toml`.

use std::process::ExitCode;

fn main() -> ExitCode {
    concord_server::cli::main()
}
