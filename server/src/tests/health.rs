//! What probes and long-lived connections see of the server.

use std::{net::SocketAddr, time::Duration};

use concord_common::lifecycle::StopOutcome;
use concord_proto::v1;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::harness::{World, eventually};

async fn world_with_probes() -> (World, SocketAddr) {
    let world = World::start_with(|config| {
        config.ops.enabled = true;
        config.ops.address = ([127, 0, 0, 1], 0).into();
    })
    .await;
    let address = world.server().ops_addr.unwrap();
    (world, address)
}

async fn get(address: SocketAddr, path: &str) -> (u16, String) {
    let mut socket = tokio::net::TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n");
    socket.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.unwrap();
    let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
    (status, answer.split_once("\r\n\r\n").unwrap().1.to_owned())
}

#[tokio::test]
async fn both_probes_tell_of_a_stuck_loop() {
    let (world, address) = world_with_probes().await;
    assert_eq!(get(address, "/livez").await.0, 200);
    assert_eq!(get(address, "/readyz").await.0, 200);
    let shutdown = world.server().shutdown();
    let heart = shutdown.heartbeat("driver", Duration::ZERO);
    for path in ["/livez", "/readyz"] {
        let (status, reason) = get(address, path).await;
        assert_eq!((status, reason.as_str()), (503, "the driver is stuck\n"));
    }
    heart.beat_within(Duration::from_mins(1));
    assert_eq!(get(address, "/readyz").await.0, 200);
}

#[tokio::test]
async fn a_part_that_ends_before_its_time_ends_the_server_as_failed() {
    let mut world = World::start().await;
    let server = world.server.take().unwrap();
    server.shutdown().spawn_critical("driver", async {});
    server.shutdown().token().cancelled().await;
    assert_eq!(server.shutdown().failed_task(), Some("driver"));
    let outcome = server.stop(Duration::from_secs(5)).await;
    assert_eq!(outcome, StopOutcome::TaskFailed);
}

#[tokio::test]
async fn a_watch_ends_in_good_order_when_its_connection_is_to_be_made_anew() {
    let world =
        World::start_with(|config| config.limits.max_connection_age = Duration::from_millis(300))
            .await;
    let [mut a] = world.silos(["a"]).await;
    for _ in 0..2 {
        // A call that meets the end of the old connection is made again, as a daemon does.
        let mut watching = eventually("a stream", async || {
            let asked = a.client.watch_rounds(v1::WatchRoundsRequest {}).await;
            Some(asked.ok()?.into_inner())
        })
        .await;
        while watching.message().await.unwrap().is_some() {}
    }
    eventually("an answer over another connection", async || {
        let asked = a.client.poll_rounds(v1::PollRoundsRequest {}).await;
        asked.ok()
    })
    .await;
}
