//! What the process uses, as the kernel counts it.

use super::names;

/// Memory resident now, in bytes; none where `/proc/self/status` cannot be read.
pub fn rss_bytes() -> Option<u64> {
    field(&status()?, "VmRSS:")
}

/// Most memory resident so far, in bytes; none where `/proc/self/status` cannot be read.
pub fn peak_rss_bytes() -> Option<u64> {
    field(&status()?, "VmHWM:")
}

/// Sets the process gauges to their present values; to be called before each scrape.
pub fn record_process_metrics() {
    let Some(status) = status() else { return };
    for (gauge, key) in [
        (names::PROCESS_RSS, "VmRSS:"),
        (names::PROCESS_PEAK_RSS, "VmHWM:"),
    ] {
        if let Some(bytes) = field(&status, key) {
            metrics::gauge!(gauge).set(bytes as f64);
        }
    }
}

fn status() -> Option<String> {
    std::fs::read_to_string("/proc/self/status").ok()
}

/// A line such as `VmRSS:     1234 kB`, in bytes.
fn field(status: &str, key: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    let kibibytes: u64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_in_bytes() {
        let status = "Name:\tx\nVmHWM:\t   20480 kB\nVmRSS:\t    1024 kB\n";
        assert_eq!(field(status, "VmHWM:"), Some(20480 * 1024));
        assert_eq!(field(status, "VmRSS:"), Some(1024 * 1024));
        assert_eq!(field(status, "VmSwap:"), None);
    }

    #[test]
    fn the_peak_is_at_least_what_is_resident() {
        let (now, peak) = (rss_bytes().unwrap(), peak_rss_bytes().unwrap());
        assert!(now > 100 * 1024, "{now}");
        assert!(peak >= now / 2, "{peak} {now}");
    }
}
