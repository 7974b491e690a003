//! Concord's server: `concord-server run --config server.toml`.

use std::{
    fmt::Display,
    io::{self, Write},
    net::IpAddr,
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand, builder::NonEmptyStringValueParser, value_parser};
use concord_common::{
    Clock as _, Role, SpiffeId, SystemClock,
    config::environment,
    error_text,
    lifecycle::{Notifier, StopOutcome, reload_signals},
    pki::{CertificateAuthority, DAY, WrittenCertificate},
    telemetry::init_logging,
};
use concord_server::{RunningServer, Server, StartError, config::ServerConfig};
use futures::StreamExt as _;

/// EX_CONFIG of sysexits.h: the service manager does not start a service again that ended so.
const EXIT_CONFIG: u8 = 78;
/// Anything else that went wrong; starting again may help.
const EXIT_FAILURE: u8 = 1;

/// Threads that requests run on; the work on payloads has threads of its own.
const WORKER_THREADS: usize = 2;

/// The coordinating server of a Concord federation.
#[derive(Debug, Parser)]
#[command(version, about, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs the server until SIGTERM or SIGINT; SIGHUP reads the certificates anew.
    ///
    /// Exit codes: 0 stopped in good order, 1 failed, 78 the configuration is not acceptable.
    Run(ConfigArguments),
    /// Checks the configuration and the certificates that it names, and does nothing else.
    CheckConfig(ConfigArguments),
    /// Makes certificates.
    #[command(subcommand)]
    Pki(Pki),
}

#[derive(Debug, Args)]
struct ConfigArguments {
    /// The configuration; variables such as CONCORD__LISTEN__ADDRESS go before it.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Pki {
    /// Makes a federation's CA: ca.crt and ca.key.
    Init {
        /// The federation's name; it stands in every certificate.
        #[arg(long, value_name = "NAME")]
        federation: String,
        /// Where to put it; made if it is not there.
        #[arg(long, alias = "dir", value_name = "FOLDER", default_value = "pki")]
        folder: PathBuf,
        /// How long it is valid.
        #[arg(long, default_value_t = 3650, value_parser = value_parser!(u32).range(1..))]
        days: u32,
        /// Replaces files that are there.
        #[arg(long)]
        force: bool,
    },
    /// Makes a certificate with its key, <role>-<name>.crt and <role>-<name>.key.
    Issue {
        /// What its holder may do: server, silo, operator or worker.
        #[arg(long)]
        role: Role,
        /// Who its holder is; a silo's name is its id.
        #[arg(long)]
        name: String,
        /// Where the CA is.
        #[arg(long, alias = "dir", value_name = "FOLDER", default_value = "pki")]
        folder: PathBuf,
        /// Where to put the certificate; beside the CA unless given.
        #[arg(long, value_name = "FOLDER")]
        out: Option<PathBuf>,
        /// DNS name or IP address to stand in it, for other programs; Concord goes by role and name. May be repeated.
        #[arg(long, value_name = "HOST", value_parser = NonEmptyStringValueParser::new())]
        host: Vec<String>,
        /// How long it is valid.
        #[arg(long, default_value_t = 90, value_parser = value_parser!(u32).range(1..))]
        days: u32,
        /// Replaces files that are there.
        #[arg(long)]
        force: bool,
    },
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Run(arguments) => run(&arguments),
        Command::CheckConfig(arguments) => check(&arguments),
        Command::Pki(command) => pki(command).map(|()| ExitCode::SUCCESS),
    };
    result.unwrap_or_else(|error| {
        let (text, code) = explain(&error);
        complain(&text);
        ExitCode::from(code)
    })
}

/// One sentence for whoever starts the server, and the exit code.
fn explain(error: &anyhow::Error) -> (String, u8) {
    let code = match error.downcast_ref::<StartError>() {
        Some(start) if start.is_configuration() => EXIT_CONFIG,
        _ => EXIT_FAILURE,
    };
    (error_text(error.as_ref()), code)
}

fn load(arguments: &ConfigArguments) -> Result<ServerConfig, StartError> {
    Ok(ServerConfig::load(
        arguments.config.as_deref(),
        environment(),
    )?)
}

fn check(arguments: &ConfigArguments) -> anyhow::Result<ExitCode> {
    let config = load(arguments)?;
    let checked = config.tls.load().and_then(|(identity, roots)| {
        identity.check(&roots, SystemClock.now())?;
        concord_common::tls::server_config(&identity, &roots, &config.federation)
    });
    checked.map_err(StartError::from)?;
    say(&mut io::stdout(), &"the configuration is acceptable")?;
    Ok(ExitCode::SUCCESS)
}

/// Writes a line to standard output. A reader that has gone, as `head` does, is no failure.
fn say(out: &mut dyn Write, line: &dyn Display) -> anyhow::Result<()> {
    match writeln!(out, "{line}") {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(error).context("standard output")
        }
        _ => Ok(()),
    }
}

fn complain(error: &dyn Display) {
    // If nobody reads standard error, there is nobody to tell.
    let _ = writeln!(io::stderr(), "error: {error}");
}

fn run(arguments: &ConfigArguments) -> anyhow::Result<ExitCode> {
    let config = load(arguments)?;
    init_logging(&config.log)?;
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKER_THREADS)
        // The allocator keeps memory for each thread; more of them would only wait for the same disk and processors. At most
        // two are taken for long, by aggregations and the like (`Context::long_work`).
        .max_blocking_threads(6)
        .enable_all()
        .build()
        .context("cannot start the runtime")?
        .block_on(serve(config))
}

async fn serve(config: ServerConfig) -> anyhow::Result<ExitCode> {
    let notifier = Notifier::from_process().context("cannot reach the service manager")?;
    let deadline = config.stop_timeout;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), "starting");
    let server = Server::start(config, Arc::new(SystemClock)).await?;
    notifier.ready();
    tracing::info!("ready");
    let shutdown = server.shutdown().clone();
    let outcome = tokio::select! {
        outcome = shutdown.run_until_stopped(deadline, &notifier) => outcome?,
        never = reload(&server, &notifier) => never?,
        () = watch(&server, &notifier) => unreachable!("the watchdog goes on until the server has stopped"),
    };
    server.stop(Duration::ZERO).await;
    Ok(if outcome.is_success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Reads the certificates anew at each SIGHUP.
async fn reload(server: &RunningServer, notifier: &Notifier) -> anyhow::Result<StopOutcome> {
    let mut signals = reload_signals()?;
    while let Some(()) = signals.next().await {
        notifier.reloading();
        match server.reload_tls() {
            Ok(peer) => tracing::info!(not_after = %peer.not_after, "certificates read anew"),
            Err(error) => {
                tracing::error!(%error, "the certificates cannot be used; the old ones stay");
            }
        }
        notifier.ready();
    }
    std::future::pending().await
}

/// Tells the service manager that the server lives, for as long as its main loops turn.
async fn watch(server: &RunningServer, notifier: &Notifier) {
    server.shutdown().watchdog(notifier).await;
    std::future::pending::<()>().await;
}

fn pki(command: Pki) -> anyhow::Result<()> {
    // A little earlier than now, for machines whose clocks are behind.
    let start = SystemClock.now() - Duration::from_hours(1);
    match command {
        Pki::Init {
            federation,
            folder,
            days,
            force,
        } => {
            let ca = CertificateAuthority::create(&federation, start, days)?;
            let written = ca.write(&folder, force)?;
            tell(&written)?;
        }
        Pki::Issue {
            role,
            name,
            folder,
            out,
            host,
            days,
            force,
        } => {
            let ca = CertificateAuthority::load(&folder)?;
            let id = SpiffeId::new(ca.federation(), role, &name)?;
            let ips: Vec<IpAddr> = host.iter().filter_map(|host| host.parse().ok()).collect();
            let names: Vec<String> = host
                .into_iter()
                .filter(|host| host.parse::<IpAddr>().is_err())
                .collect();
            let issued = ca.issue(&id, &names, &ips, start, DAY * days)?;
            let written = issued.write(out.as_deref().unwrap_or(&folder), force)?;
            tell(&written)?;
        }
    }
    Ok(())
}

fn tell(written: &WrittenCertificate) -> anyhow::Result<()> {
    say(&mut io::stdout(), &written.certificate.display())?;
    say(&mut io::stdout(), &written.key.display())
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;

    /// Standard output that fails in one way.
    struct Failing(io::ErrorKind);

    impl Write for Failing {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(self.0.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_reader_that_has_gone_is_no_failure_and_a_full_disk_is() {
        say(&mut Failing(io::ErrorKind::BrokenPipe), &"line").unwrap();
        let error = say(&mut Failing(io::ErrorKind::StorageFull), &"line").unwrap_err();
        assert!(error.to_string().contains("standard output"), "{error}");
    }

    #[test]
    fn a_certificate_for_no_day_and_a_host_without_a_name_are_refused() {
        let parse = |arguments: &str| {
            let all = format!("concord-server pki {arguments}");
            Arguments::try_parse_from(all.split(' '))
        };
        let issue = "issue --role silo --name a";
        parse(issue).unwrap();
        for wrong in [
            "init --federation north --days 0",
            &format!("{issue} --days 0"),
            &format!("{issue} --days -1"),
            &format!("{issue} --host="),
        ] {
            let error = parse(wrong).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{wrong}: {error}");
        }
    }
    /// A configuration with everything that it names, in a folder of its own.
    fn configured() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path();
        let start = SystemClock.now() - Duration::from_hours(1);
        let ca = CertificateAuthority::create("north", start, 2).unwrap();
        ca.write(at, false).unwrap();
        let id = SpiffeId::new("north", Role::Server, "hub").unwrap();
        let issued = ca.issue(&id, &[], &[], start, DAY).unwrap();
        issued.write(at, false).unwrap();
        let text = format!(
            "federation = \"north\"\nstate_dir = \"{0}/state\"\n[listen]\naddress = \"127.0.0.1:0\"\n\
             [ops]\nenabled = false\n[tls]\ncertificate = \"{0}/server-hub.crt\"\n\
             key = \"{0}/server-hub.key\"\nca = \"{0}/ca.crt\"\n",
            at.display()
        );
        let path = at.join("server.toml");
        fs::write(&path, text).unwrap();
        (folder, path)
    }

    /// How `run` ends that cannot start: what it says and its exit code. Logging is the process's, and left out.
    fn refused(path: &Path) -> (String, u8) {
        let arguments = ConfigArguments {
            config: Some(path.to_owned()),
        };
        let config = match load(&arguments) {
            Ok(config) => config,
            Err(error) => return explain(&error.into()),
        };
        let runtime = tokio::runtime::Runtime::new().unwrap();
        explain(&runtime.block_on(serve(config)).unwrap_err())
    }

    fn change(path: &Path, from: &str, to: &str) {
        let text = fs::read_to_string(path).unwrap();
        assert!(text.contains(from), "{text}");
        fs::write(path, text.replace(from, to)).unwrap();
    }

    #[test]
    fn a_missing_file_is_named_once_with_its_reason_and_exit_code_78() {
        for missing in ["server-hub.crt", "server-hub.key", "ca.crt", "server.toml"] {
            let (folder, path) = configured();
            let file = folder.path().join(missing);
            fs::remove_file(&file).unwrap();
            let (text, code) = refused(&path);
            assert_eq!(code, EXIT_CONFIG, "{text}");
            let named = file.display().to_string();
            for once in [named.as_str(), "No such file or directory"] {
                assert_eq!(text.matches(once).count(), 1, "{once}: {text}");
            }
        }
    }

    #[test]
    fn a_file_that_cannot_be_used_is_named_with_exit_code_78() {
        use std::os::unix::fs::PermissionsExt as _;

        let (folder, path) = configured();
        let key = folder.path().join("server-hub.key");
        fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
        let (text, code) = refused(&path);
        assert_eq!(code, EXIT_CONFIG, "{text}");
        assert!(
            text.contains("chmod 600") && text.contains("server-hub.key"),
            "{text}"
        );

        let (folder, path) = configured();
        fs::write(folder.path().join("server-hub.crt"), "no certificate").unwrap();
        let (text, code) = refused(&path);
        assert_eq!(code, EXIT_CONFIG, "{text}");
        assert!(text.contains("server-hub.crt"), "{text}");
    }

    #[test]
    fn a_setting_that_cannot_be_used_is_named_with_exit_code_78() {
        for (from, to, named) in [
            ("[listen]", "[listen]\nwibble = 1", "wibble"),
            ("127.0.0.1:0", "nowhere", "listen.address"),
            ("\"north\"", "\"North!\"", "federation"),
        ] {
            let (_folder, path) = configured();
            change(&path, from, to);
            let (text, code) = refused(&path);
            assert_eq!(code, EXIT_CONFIG, "{text}");
            assert!(text.contains(named), "{text}");
        }
    }

    #[test]
    fn a_port_in_use_is_named_once_with_its_reason_and_exit_code_1() {
        let (_folder, path) = configured();
        let holder = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = holder.local_addr().unwrap().to_string();
        change(&path, "127.0.0.1:0", &address);
        let (text, code) = refused(&path);
        assert_eq!(code, EXIT_FAILURE, "{text}");
        for once in [address.as_str(), "in use"] {
            assert_eq!(text.matches(once).count(), 1, "{once}: {text}");
        }
    }
}
