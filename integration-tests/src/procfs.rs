//! What the kernel says about a process: memory, processor time, mapped files. Linux only, like the service units.

use std::{fs, io};

/// Ticks a second in `/proc`; fixed by Linux's interface to user space on every architecture that Concord runs on.
const TICKS_PER_SECOND: f64 = 100.0;

/// Most memory that the process has had resident so far, in bytes.
///
/// # Errors
/// If the process is gone or the kernel writes the file in another way.
pub fn peak_rss_bytes(pid: u32) -> io::Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let kilobytes = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .and_then(|rest| rest.trim().strip_suffix("kB"))
        .and_then(|number| number.trim().parse::<u64>().ok());
    kilobytes
        .map(|kilobytes| kilobytes * 1024)
        .ok_or_else(|| malformed("status"))
}

/// Processor seconds of the process so far, user and system, all threads.
///
/// # Errors
/// As [`peak_rss_bytes`].
pub fn cpu_seconds(pid: u32) -> io::Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The second field is the program's name in parentheses and may hold anything; fields 14 and 15 are utime and stime.
    let (_, fields) = stat.rsplit_once(')').ok_or_else(|| malformed("stat"))?;
    let mut times = fields
        .split_whitespace()
        .skip(11)
        .map_while(|field| field.parse::<u64>().ok());
    let (Some(user), Some(system)) = (times.next(), times.next()) else {
        return Err(malformed("stat"));
    };
    Ok((user + system) as f64 / TICKS_PER_SECOND)
}

/// The files that the process has mapped, as the text of its `maps`.
///
/// # Errors
/// If the process is gone or belongs to somebody else.
pub fn mapped_files(pid: u32) -> io::Result<String> {
    fs::read_to_string(format!("/proc/{pid}/maps"))
}

/// The processes that this one has started and that run, in no order.
///
/// # Errors
/// If the process is gone or belongs to somebody else.
pub fn children(pid: u32) -> io::Result<Vec<u32>> {
    let mut children = Vec::new();
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread may end while it is looked at.
        let text = fs::read_to_string(thread?.path().join("children")).unwrap_or_default();
        children.extend(
            text.split_whitespace()
                .filter_map(|pid| pid.parse::<u32>().ok()),
        );
    }
    Ok(children)
}

fn malformed(file: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("/proc/<pid>/{file} is not as expected"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_memory_and_maps_its_own_program() {
        let pid = std::process::id();
        assert!(peak_rss_bytes(pid).unwrap() > 1024 * 1024);
        assert!((0.0..3600.0).contains(&cpu_seconds(pid).unwrap()));
        let program = std::env::current_exe().unwrap();
        assert!(
            mapped_files(pid)
                .unwrap()
                .contains(program.to_str().unwrap())
        );
    }
}
