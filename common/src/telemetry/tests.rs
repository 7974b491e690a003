use std::sync::{Arc, Mutex};

use metrics_exporter_prometheus::PrometheusBuilder;
use tracing_subscriber::fmt::MakeWriter;

use super::{
    names::{ALL, Kind},
    *,
};

#[test]
fn every_metric_has_a_proper_name_of_its_own() {
    let mut names: Vec<_> = ALL.iter().map(|metric| metric.name).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), ALL.len());
    for metric in ALL {
        assert!(metric.name.starts_with("concord_"), "{}", metric.name);
        assert_eq!(
            metric.name.ends_with("_total"),
            metric.kind == Kind::Counter,
            "{}",
            metric.name
        );
        assert!(metric.help.ends_with('.'), "{}", metric.name);
    }
}

#[test]
fn every_counter_is_there_before_its_first_event() {
    let recorder = PrometheusBuilder::new().build_recorder();
    metrics::with_local_recorder(&recorder, describe_all);
    let text = recorder.handle().render();
    assert!(
        text.contains("concord_tls_handshakes_refused_total{reason=\"expired\"} 0"),
        "{text}"
    );
    assert!(text.contains("concord_tls_connections_open 0"), "{text}");
    assert!(
        text.contains("# HELP concord_tls_connections_total "),
        "{text}"
    );
}

#[test]
fn every_reason_for_a_refused_handshake_begins_at_zero() {
    use crate::tls::HandshakeRefusal;

    let declared = ALL
        .iter()
        .find(|metric| metric.name == names::TLS_HANDSHAKES_REFUSED)
        .and_then(|metric| metric.label)
        .map(|(_, values)| values.to_vec())
        .unwrap();
    let all: Vec<_> = HandshakeRefusal::ALL
        .iter()
        .map(|reason| reason.as_str())
        .collect();
    assert_eq!(declared, all);
}

#[test]
fn process_memory_is_exported() {
    let recorder = PrometheusBuilder::new().build_recorder();
    metrics::with_local_recorder(&recorder, record_process_metrics);
    let text = recorder.handle().render();
    assert!(
        text.contains("concord_process_resident_memory_bytes "),
        "{text}"
    );
    assert!(
        text.contains("concord_process_peak_resident_memory_bytes "),
        "{text}"
    );
}

/// Collects what is logged.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Lines {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

fn logged(section: &LogSection, log: impl FnOnce()) -> String {
    let lines = Lines::default();
    let subscriber = subscriber(
        section.format,
        parse_filter(&section.filter).unwrap(),
        lines.clone(),
        false,
    );
    tracing::dispatcher::with_default(&subscriber, log);
    let bytes = lines.0.lock().unwrap().clone();
    String::from_utf8(bytes).unwrap()
}

#[test]
fn a_json_line_is_one_object_with_the_fields_in_it() {
    let section = LogSection {
        format: LogFormat::Json,
        filter: "info".to_owned(),
    };
    let text = logged(&section, || {
        tracing::warn!(silo = "clinic-a", round = 3, "lease lost");
        tracing::debug!("too detailed");
    });
    let line: serde_json::Value = serde_json::from_str(text.trim_end()).unwrap();
    assert_eq!(line["message"], "lease lost");
    assert_eq!(line["silo"], "clinic-a");
    assert_eq!(line["round"], 3);
    assert_eq!(line["level"], "WARN");
}

#[test]
fn a_text_line_has_the_fields_after_the_message() {
    let text = logged(&LogSection::default(), || {
        tracing::info!(silo = "clinic-a", "lease claimed");
    });
    assert!(text.contains("lease claimed silo=\"clinic-a\""), "{text}");
}

#[test]
fn a_filter_that_is_none_is_refused_with_an_example() {
    let error = parse_filter("concord=loudest").unwrap_err().to_string();
    assert!(
        error.contains("concord=loudest") && error.contains("info,"),
        "{error}"
    );
}
