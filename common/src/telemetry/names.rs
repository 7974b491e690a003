//! Every metric that Concord exports: name, kind, description and label, in one place.
//!
//! To add one, add an entry to the list below and use the constant with the `metrics` macros.

/// What a metric's values mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Only grows while the process lives; its name ends in `_total`.
    Counter,
    /// Goes up and down.
    Gauge,
    /// A distribution.
    Histogram,
}

/// A metric's declaration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Metric {
    /// Name as Prometheus sees it.
    pub name: &'static str,
    /// What its values mean.
    pub kind: Kind,
    /// One line for people, with the unit.
    pub help: &'static str,
    /// The label's key and all its values where they are known; a counter or gauge then begins at zero for each of them. An
    /// empty list of values means that they are known only at run time.
    pub label: Option<(&'static str, &'static [&'static str])>,
}

macro_rules! declare {
    ($($constant:ident = $kind:ident $name:literal $help:literal $([$key:literal: $($value:literal),*])?;)*) => {
        $(#[doc = $help] pub const $constant: &str = $name;)*

        /// Every metric, in the order of the documentation.
        pub const ALL: &[Metric] = &[$(Metric {
            name: $name,
            kind: Kind::$kind,
            help: $help,
            label: declare!(@label $([$key: $($value),*])?),
        },)*];
    };
    (@label [$key:literal: $($value:literal),*]) => { Some(($key, &[$($value),*])) };
    (@label) => { None };
}

declare! {
    TLS_CONNECTIONS = Counter "concord_tls_connections_total"
        "Connections whose TLS handshake succeeded.";
    TLS_CONNECTIONS_OPEN = Gauge "concord_tls_connections_open"
        "Authenticated connections that are open now.";
    TLS_HANDSHAKES_REFUSED = Counter "concord_tls_handshakes_refused_total"
        "Connections that were refused before any call, by reason."
        ["reason": "no_certificate", "unknown_ca", "expired", "wrong_federation", "bad_identity", "timeout",
         "refused_by_client", "limit", "peer_limit", "protocol"];
    TLS_CERTIFICATE_EXPIRY = Gauge "concord_tls_certificate_expiry_seconds"
        "When this process's own certificate ends, in seconds since 1970.";
    JOBS = Counter "concord_jobs_total"
        "Jobs by the state that they came into."
        ["state": "queued", "running", "succeeded", "failed", "cancelled"];
    JOBS_RUNNING = Gauge "concord_jobs_running"
        "Jobs that the server is running now.";
    ROUNDS = Counter "concord_rounds_total"
        "Rounds by the phase that they came into."
        ["phase": "announced", "aggregating", "published", "failed", "cancelled"];
    ROUND_SECONDS = Histogram "concord_round_seconds"
        "Time from a round's announcement to its end, in seconds.";
    AGGREGATION_SECONDS = Histogram "concord_aggregation_seconds"
        "Time to aggregate a round's contributions and store the result, in seconds.";
    CONTRIBUTIONS = Counter "concord_contributions_total"
        "Silos' parts in rounds by what became of them."
        ["outcome": "accepted", "rejected", "discarded", "declined", "repeated"];
    REFUSALS = Counter "concord_refusals_total"
        "Calls that were refused, by error code."
        ["code":];
    TRANSFERS_ACTIVE = Gauge "concord_transfers_active"
        "Uploads and downloads that are being served now.";
    TRANSFERS_WAITING = Gauge "concord_transfers_waiting"
        "Uploads and downloads that wait for their turn now.";
    TRANSFER_BYTES = Counter "concord_transfer_bytes_total"
        "Payload bytes received from silos (up) and sent to them (down)."
        ["direction": "up", "down"];
    SILOS_WATCHING = Gauge "concord_silos_watching"
        "Silos that watch for rounds now.";
    WORKER_JOBS = Counter "concord_worker_jobs_total"
        "Jobs that workers run, by the state that they came into; they count in concord_jobs_total too."
        ["state": "queued", "running", "succeeded", "failed", "cancelled"];
    WORKER_LEASES = Counter "concord_worker_leases_total"
        "Leases on jobs that workers run, by how they began or ended."
        ["outcome": "granted", "released", "expired", "cancelled"];
    WORKER_JOURNAL_LINES = Counter "concord_worker_journal_lines_total"
        "Lines that workers added to the journals of their jobs.";
    WORKER_OBJECT_BYTES = Counter "concord_worker_object_bytes_total"
        "Bytes of objects received from workers (up) and sent to workers and operators (down)."
        ["direction": "up", "down"];
    WORKER_STARTS = Counter "concord_worker_starts_total"
        "Worker processes that the server has started.";
    SPOOL_SYNCS = Counter "concord_spool_syncs_total"
        "Groups of uploads that were synced to the disk together.";
    SPOOL_SYNCED_FILES = Counter "concord_spool_synced_files_total"
        "Uploads that were synced to the disk.";
    DATASTORE_TRANSACTIONS = Counter "concord_datastore_transactions_total"
        "Transactions by name, and by outcome (committed, retried, failed)."
        ["name":];
    PROCESS_RSS = Gauge "concord_process_resident_memory_bytes"
        "Memory that the process has resident now, in bytes.";
    PROCESS_PEAK_RSS = Gauge "concord_process_peak_resident_memory_bytes"
        "Most memory that the process has had resident, in bytes.";
}

/// Describes every metric to the installed recorder, and sets counters and gauges with known labels to zero so that a
/// dashboard sees them before the first event.
pub fn describe_all() {
    for metric in ALL {
        match metric.kind {
            Kind::Counter => metrics::describe_counter!(metric.name, metric.help),
            Kind::Gauge => metrics::describe_gauge!(metric.name, metric.help),
            Kind::Histogram => metrics::describe_histogram!(metric.name, metric.help),
        }
        match metric.label {
            None => zero(metric, vec![]),
            Some((key, values)) => {
                for value in values {
                    zero(metric, vec![metrics::Label::new(key, *value)]);
                }
            }
        }
    }
}

fn zero(metric: &Metric, labels: Vec<metrics::Label>) {
    match metric.kind {
        Kind::Counter => metrics::counter!(metric.name, labels).increment(0),
        Kind::Gauge => metrics::gauge!(metric.name, labels).set(0.0),
        Kind::Histogram => {}
    }
}
