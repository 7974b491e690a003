//! Callers that may not call: each is logged, but no more of them than a reader can take in.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use concord_common::{code::Refusal, tls::ConnectionInfo};
use tokio::time::Instant;
use tonic::Request;

/// Lines in each [`WINDOW`]; what is more is only counted, here and in the metric of refusals.
const MOST: u64 = 30;
const WINDOW: Duration = Duration::from_mins(1);

/// Lines of one window of time.
#[derive(Debug)]
struct Quota {
    began: Instant,
    asked: u64,
}

impl Quota {
    fn new(now: Instant) -> Self {
        Self {
            began: now,
            asked: 0,
        }
    }

    /// Whether one more line may be written; with the number of those that were left out before, if this is the first after.
    fn take(&mut self, now: Instant) -> Option<u64> {
        let mut left_out = 0;
        if now.duration_since(self.began) >= WINDOW {
            left_out = self.asked.saturating_sub(MOST);
            *self = Self::new(now);
        }
        self.asked += 1;
        (self.asked <= MOST).then_some(left_out)
    }
}

/// Logs that a caller was refused, and who it is.
pub(super) fn log<T>(request: &Request<T>, refusal: &Refusal) {
    static QUOTA: Mutex<Option<Quota>> = Mutex::new(None);
    log_within(&QUOTA, request.extensions().get(), refusal);
}

fn log_within(quota: &Mutex<Option<Quota>>, caller: Option<&ConnectionInfo>, refusal: &Refusal) {
    let now = Instant::now();
    let left_out = quota
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .get_or_insert_with(|| Quota::new(now))
        .take(now);
    let Some(left_out) = left_out else {
        return;
    };
    if left_out > 0 {
        tracing::warn!(
            callers = left_out,
            "more callers were refused and not logged"
        );
    }
    tracing::warn!(
        peer = caller.map(|caller| tracing::field::display(&caller.peer.id)),
        remote = caller.map(|caller| tracing::field::display(caller.remote)),
        code = %refusal.code,
        reason = refusal.message,
        "a caller was refused"
    );
}

#[cfg(test)]
mod tests {
    use std::{io, sync::Arc};

    use concord_common::{ErrorCode, Timestamp, tls::PeerIdentity};

    use super::*;

    /// What is logged, in memory.
    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Log {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(buf);
            Ok(buf.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_refused_caller_is_logged_with_who_it_is_and_why() {
        let log = Log::default();
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_writer(move || writer.clone())
            .with_ansi(false)
            .finish();
        let caller = ConnectionInfo {
            remote: ([127, 0, 0, 1], 4711).into(),
            peer: PeerIdentity {
                id: "spiffe://north/worker/w1".parse().unwrap(),
                serial: "01".to_owned(),
                not_after: Timestamp(0),
            },
        };
        let refusal = Refusal::new(ErrorCode::WrongRole, "this service is for the role silo");
        tracing::subscriber::with_default(subscriber, || {
            log_within(&Mutex::new(None), Some(&caller), &refusal);
        });
        let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
        for part in [
            "WARN",
            "spiffe://north/worker/w1",
            "127.0.0.1:4711",
            "WRONG_ROLE",
            "for the role silo",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }

    #[test]
    fn a_flood_of_refused_callers_fills_no_log_and_is_counted() {
        let start = Instant::now();
        let mut quota = Quota::new(start);
        for _ in 0..MOST {
            assert_eq!(quota.take(start), Some(0));
        }
        for _ in 0..5 {
            assert_eq!(quota.take(start), None);
        }
        let later = start + WINDOW;
        assert_eq!(quota.take(later), Some(5));
        assert_eq!(quota.take(later), Some(0));
    }
}
