//! When calls are broken off.

use std::future::pending;

use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};

/// How long calls may go on: until the time that the channel names, and as they need while it names none. Whoever holds the other end may name one
/// at any time, and another later; calls that wait hear of it.
#[derive(Debug, Clone)]
pub struct Until(watch::Receiver<Option<Instant>>);

impl Until {
    /// Until the time in a channel.
    pub fn new(time: watch::Receiver<Option<Instant>>) -> Self {
        Self(time)
    }

    /// Waits for that time.
    pub async fn come(&self) {
        let mut time = self.0.clone();
        loop {
            let named = *time.borrow_and_update();
            let renamed = async {
                if time.changed().await.is_err() {
                    // Nobody is left who could name another.
                    pending::<()>().await;
                }
            };
            match named {
                None => renamed.await,
                Some(at) => {
                    if timeout_at(at, renamed).await.is_err() {
                        return;
                    }
                }
            }
        }
    }
}
