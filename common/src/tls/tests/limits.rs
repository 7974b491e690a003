//! What slow, greedy and foreign peers can do to the others: nothing.

use std::{error::Error as _, time::Duration};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

use super::{
    super::*,
    kit::{Federation, PATIENCE, Running, call},
};

/// A connection on which nothing is ever said.
async fn silent(server: &Running) -> TcpStream {
    TcpStream::connect(server.address).await.unwrap()
}

/// Waits for the other side to close.
async fn read_to_end(socket: &mut TcpStream) {
    let mut bytes = Vec::new();
    // A reset is an end as well.
    let _ = timeout(PATIENCE, socket.read_to_end(&mut bytes))
        .await
        .expect("the server never closed the connection");
}

#[tokio::test]
async fn slow_handshakes_do_not_hold_up_others() {
    let north = Federation::new("north");
    let server = Running::start_with(
        north.server(),
        AcceptorLimits {
            handshake_timeout: Duration::from_hours(1),
            ..AcceptorLimits::default()
        },
    );
    let mut slow = Vec::new();
    for _ in 0..10 {
        slow.push(silent(&server).await);
    }
    let channel = server.channel(north.client(&north.identity(Role::Silo, "clinic-a")));
    call(&channel).await.unwrap();
    drop(slow);
}

#[tokio::test]
async fn a_slow_handshake_is_cut_off_and_its_place_is_free_again() {
    let north = Federation::new("north");
    let server = Running::start_with(
        north.server(),
        AcceptorLimits {
            max_connections: 1,
            max_handshakes: 1,
            handshake_timeout: Duration::from_millis(200),
            ..AcceptorLimits::default()
        },
    );
    let mut slow = silent(&server).await;
    read_to_end(&mut slow).await;
    server.wait_for_refusals("timeout", 1).await;

    let channel = server.channel(north.client(&north.identity(Role::Silo, "clinic-a")));
    call(&channel).await.unwrap();
}

#[tokio::test]
async fn handshakes_beyond_the_limit_wait_for_their_turn() {
    let north = Federation::new("north");
    let server = Running::start_with(
        north.server(),
        AcceptorLimits {
            max_handshakes: 1,
            handshake_timeout: Duration::from_millis(200),
            ..AcceptorLimits::default()
        },
    );
    let _slow = silent(&server).await;
    let channel = server.channel(north.client(&north.identity(Role::Silo, "clinic-a")));
    call(&channel).await.unwrap();
    server.wait_for_refusals("timeout", 1).await;
}

#[tokio::test]
async fn a_crowd_gets_in_two_by_two() {
    let north = Federation::new("north");
    let server = Running::start_with(
        north.server(),
        AcceptorLimits {
            max_connections_per_peer: 40,
            max_handshakes: 2,
            ..AcceptorLimits::default()
        },
    );
    let client = north.client(&north.identity(Role::Silo, "clinic-a"));
    let channels: Vec<_> = (0..40)
        .map(|_| server.channel(Arc::clone(&client)))
        .collect();
    for answer in futures::future::join_all(channels.iter().map(call)).await {
        answer.unwrap();
    }
    assert_eq!(server.connections(), 40);
}

#[tokio::test]
async fn connections_beyond_the_limit_are_refused_until_one_ends() {
    let north = Federation::new("north");
    let server = Running::start_with(
        north.server(),
        AcceptorLimits {
            max_connections: 1,
            ..AcceptorLimits::default()
        },
    );
    let client = north.client(&north.identity(Role::Silo, "clinic-a"));
    let first = server.channel(Arc::clone(&client));
    call(&first).await.unwrap();

    let second = server.channel(client);
    let status = call(&second).await.unwrap_err();
    let error = connect_error(&status);
    assert!(matches!(error, ConnectError::Closed { .. }), "{error}");
    assert!(error.to_string().contains("connection limit"), "{error}");
    server.wait_for_refusals("limit", 1).await;

    drop(first);
    server.wait_for("concord_tls_connections_open 0").await;
    call(&second).await.unwrap();
}

#[tokio::test]
async fn one_peer_cannot_take_the_places_of_the_others() {
    let north = Federation::new("north");
    let server = Running::start_with(
        north.server(),
        AcceptorLimits {
            max_connections_per_peer: 2,
            ..AcceptorLimits::default()
        },
    );
    // Another certificate of the same silo is the same silo.
    let clients = [(); 3].map(|()| north.client(&north.identity(Role::Silo, "clinic-a")));
    let greedy = clients.map(|client| server.channel(client));
    call(&greedy[0]).await.unwrap();
    call(&greedy[1]).await.unwrap();
    call(&greedy[2]).await.unwrap_err();
    server.wait_for_refusals("peer_limit", 1).await;
    let other = server.channel(north.client(&north.identity(Role::Silo, "clinic-b")));
    call(&other).await.unwrap();
    // An operator of the same name comes in too, as far as the service lets it.
    let operator = server.channel(north.client(&north.identity(Role::Operator, "clinic-a")));
    let status = call(&operator).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::PermissionDenied);

    let [first, _second, third] = greedy;
    drop(first);
    let given_up = tokio::time::Instant::now() + PATIENCE;
    while call(&third).await.is_err() {
        assert!(tokio::time::Instant::now() < given_up, "no place came free");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_peer_that_speaks_no_tls_is_refused() {
    let north = Federation::new("north");
    let server = Running::start(&north);
    let mut socket = silent(&server).await;
    socket.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    read_to_end(&mut socket).await;
    server.wait_for_refusals("protocol", 1).await;
}

#[tokio::test]
async fn a_peer_that_leaves_during_the_handshake_is_counted() {
    let north = Federation::new("north");
    let server = Running::start(&north);
    drop(silent(&server).await);
    server.wait_for_refusals("protocol", 1).await;
}

#[tokio::test]
async fn a_client_that_does_not_ask_for_http_2_is_refused() {
    let north = Federation::new("north");
    let server = Running::start(&north);
    let mut client = north.client(&north.identity(Role::Silo, "clinic-a"));
    Arc::make_mut(&mut client).alpn_protocols.clear();
    let mut stream = server.connect_raw(client).await;
    let mut bytes = Vec::new();
    let _ = timeout(PATIENCE, stream.read_to_end(&mut bytes))
        .await
        .expect("the server never closed the connection");
    assert!(bytes.is_empty());
    server.wait_for_refusals("protocol", 1).await;
}

#[tokio::test]
async fn a_channel_survives_a_server_that_is_not_up_and_one_that_goes_away() {
    let north = Federation::new("north");
    let server = Running::start(&north);
    let address = server.address;
    server.stop().await;

    let client = north.client(&north.identity(Role::Silo, "clinic-a"));
    let url = format!("https://{address}");
    let channel = connect_channel(&url, client, ChannelOptions::default()).unwrap();
    let status = call(&channel).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::Unavailable);
    assert_eq!(explain_tls_error(&status), None);
    let error = connect_error(&status);
    assert!(matches!(error, ConnectError::Unreachable { .. }), "{error}");
    assert!(error.to_string().contains(&address.to_string()), "{error}");

    for _ in 0..2 {
        let server = Running::start_at(address, north.server(), AcceptorLimits::default());
        // The first call may still meet the connection that has just ended.
        if call(&channel).await.is_err() {
            call(&channel).await.unwrap();
        }
        server.stop().await;
    }
}

#[tokio::test]
async fn a_server_that_says_nothing_is_given_up() {
    let north = Federation::new("north");
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://{}", listener.local_addr().unwrap());
    let options = ChannelOptions {
        connect_timeout: Duration::from_millis(100),
        ..ChannelOptions::default()
    };
    let client = north.client(&north.identity(Role::Silo, "clinic-a"));
    let channel = connect_channel(&url, client, options).unwrap();
    let status = call(&channel).await.unwrap_err();
    let error = connect_error(&status);
    assert!(
        error.to_string().contains("did not answer within 100ms"),
        "{error}"
    );
}

#[tokio::test]
async fn a_server_can_be_stopped_while_a_handshake_runs() {
    let north = Federation::new("north");
    let server = Running::start(&north);
    let mut slow = silent(&server).await;
    server.stop().await;
    read_to_end(&mut slow).await;
}

fn connect_error(status: &tonic::Status) -> &ConnectError {
    let mut next = status.source();
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref() {
            return found;
        }
        next = error.source();
    }
    panic!("no connect error in {status:?}");
}
