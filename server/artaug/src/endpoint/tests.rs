use std::pin::pin;

use concord_common::config::ByteSize;
use serde_json::json;
use tokio::{sync::watch, time::timeout};

use super::{
    testing::{Play, TestServer, key_file, never},
    *,
};

/// A good answer and what it took to get it.
#[derive(Debug, Clone, PartialEq)]
struct Answer {
    body: Value,
    calls: u64,
}

async fn post(settings: EndpointSettings) -> Result<Answer, EndpointError> {
    let mut calls = 0;
    let body = Endpoint::open(settings, never())?
        .post("chat/completions", &json!({"a": 1}), &mut calls)
        .await?;
    Ok(Answer { body, calls })
}

fn setting_error(settings: EndpointSettings) -> String {
    Endpoint::open(settings, never()).unwrap_err().to_string()
}

/// An endpoint whose calls go on until the time that is put into the other end.
fn timed(settings: EndpointSettings) -> (watch::Sender<Option<Instant>>, Endpoint) {
    let (time, until) = watch::channel(None);
    (time, Endpoint::open(settings, Until::new(until)).unwrap())
}

#[tokio::test]
async fn a_call_carries_the_body_to_the_path_below_the_base() {
    let server = TestServer::start(vec![Play::ok(r#"{"b": 2}"#)]);
    let answer = post(server.settings()).await.unwrap();
    assert_eq!(
        answer,
        Answer {
            body: json!({"b": 2}),
            calls: 1
        }
    );
    let request = &server.requests()[0];
    assert!(
        request
            .head
            .starts_with("POST /v1/chat/completions HTTP/1.1"),
        "{}",
        request.head
    );
    assert_eq!(request.body, json!({"a": 1}));
    assert!(!request.head.to_ascii_lowercase().contains("authorization"));
}

#[tokio::test]
async fn passing_failures_are_tried_again_and_counted() {
    let server = TestServer::start(vec![
        Play::Answer("503 Service Unavailable", "", "loading".to_owned()),
        Play::Answer("429 Too Many Requests", "retry-after: 0\r\n", String::new()),
        Play::Raw(Vec::new()),
        Play::ok("[]"),
    ]);
    let answer = post(server.settings()).await.unwrap();
    assert_eq!(answer.calls, 4);
    assert_eq!(server.requests().len(), 4);
}

#[tokio::test]
async fn after_the_last_try_the_last_failure_is_told() {
    let busy = || {
        Play::Answer(
            "500 Internal Server Error",
            "",
            "out of\n memory".to_owned(),
        )
    };
    let server = TestServer::start(vec![busy(), busy()]);
    let error = post(EndpointSettings {
        attempts: 2,
        ..server.settings()
    })
    .await
    .unwrap_err();
    assert!(
        error.to_string().contains("500") && error.to_string().contains("out of  memory"),
        "{error}"
    );
    assert_eq!(error.code(), "http-500");
}

#[tokio::test]
async fn a_refusal_is_not_tried_again() {
    for (status, about_the_request) in [
        ("401 Unauthorized", false),
        ("404 Not Found", false),
        ("400 Bad Request", true),
    ] {
        let server = TestServer::start(vec![Play::Answer(status, "", "no".repeat(5000))]);
        let error = post(server.settings()).await.unwrap_err();
        assert_eq!(error.is_about_the_request(), about_the_request, "{status}");
        assert!(error.to_string().len() < 600);
        assert_eq!(server.requests().len(), 1);
    }
}

#[tokio::test]
async fn a_redirect_is_not_followed() {
    let elsewhere = TestServer::start(vec![Play::ok("{}")]);
    let answer = format!(
        "HTTP/1.1 307 Temporary Redirect\r\nlocation: http://{}/\r\ncontent-length: 0\r\n\r\n",
        elsewhere.address
    );
    let server = TestServer::start(vec![Play::Raw(answer.into_bytes())]);
    let error = post(server.settings()).await.unwrap_err();
    assert_eq!(error.code(), "http-307");
    assert!(elsewhere.requests().is_empty());
}

#[test]
fn waits_are_doubled_and_what_an_endpoint_asks_for_is_bounded() {
    let endpoint = Endpoint::open(EndpointSettings::new("http://127.0.0.1/v1"), never()).unwrap();
    let busy = |seconds: Option<u64>| EndpointError::Status {
        url: String::new(),
        status: StatusCode::TOO_MANY_REQUESTS,
        text: String::new(),
        retry_after: seconds.map(Duration::from_secs),
    };
    let waits =
        [1, 2, 3, 7, u64::MAX].map(|calls| endpoint.wait_after(&busy(None), calls).as_secs());
    assert_eq!(waits, [1, 2, 4, 60, 60]);
    assert_eq!(endpoint.wait_after(&busy(Some(20)), 1).as_secs(), 20);
    assert_eq!(endpoint.wait_after(&busy(Some(999_999)), 1), MAX_WAIT);
}

#[tokio::test]
async fn the_wait_that_an_endpoint_asks_for_is_read() {
    let server = TestServer::start(vec![Play::Answer(
        "429 Too Many Requests",
        "retry-after: 7\r\n",
        String::new(),
    )]);
    let error = post(EndpointSettings {
        attempts: 1,
        ..server.settings()
    })
    .await
    .unwrap_err();
    assert!(
        matches!(error, EndpointError::Status { retry_after: Some(wait), .. } if wait.as_secs() == 7),
        "{error:?}"
    );
}

#[tokio::test]
async fn silence_ends_with_the_timeout() {
    let server = TestServer::start(vec![Play::Silence]);
    let settings = EndpointSettings {
        attempts: 1,
        timeout: Duration::from_millis(100),
        ..server.settings()
    };
    assert_eq!(post(settings).await.unwrap_err().code(), "timeout");
}

#[tokio::test]
async fn an_answer_that_trickles_for_ever_ends_with_the_timeout() {
    let head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n".to_vec();
    let server = TestServer::start(vec![Play::Endless(head, b"1\r\n \r\n".to_vec())]);
    let settings = EndpointSettings {
        attempts: 1,
        timeout: Duration::from_millis(200),
        max_answer: ByteSize::mebibytes(64),
        ..server.settings()
    };
    let code = post(settings).await.unwrap_err().code();
    assert!(code == "timeout" || code == "large", "{code}");
}

#[tokio::test]
async fn a_large_answer_is_cut_off_announced_or_not() {
    let announced = b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999\r\n\r\n{".to_vec();
    let chunked = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n".to_vec();
    let chunk = [b"1000\r\n".as_slice(), &[b' '; 4096], b"\r\n"].concat();
    for play in [Play::Raw(announced), Play::Endless(chunked, chunk)] {
        let server = TestServer::start(vec![play]);
        let error = post(server.settings()).await.unwrap_err();
        assert_eq!(error.code(), "large", "{error}");
        assert!(error.is_about_the_request());
    }
}

#[tokio::test]
async fn nonsense_instead_of_http_is_an_error() {
    let many_headers = format!("HTTP/1.1 200 OK\r\n{}\r\n{{}}", "a: b\r\n".repeat(1000));
    for bytes in [
        b"hello".to_vec(),
        vec![0xFF; 100_000],
        many_headers.into_bytes(),
        b"HTTP/1.1 200 OK\r\ncontent-length: 50\r\n\r\n{\"short\"".to_vec(),
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n".to_vec(),
    ] {
        let server = TestServer::start(vec![Play::Raw(bytes)]);
        let error = post(EndpointSettings {
            attempts: 1,
            ..server.settings()
        })
        .await
        .unwrap_err();
        assert_eq!(error.code(), "connection", "{error}");
    }
}

#[tokio::test]
async fn a_body_that_is_no_json_or_too_deep_is_an_error() {
    for body in ["<html>".to_owned(), String::new(), "[".repeat(100_000)] {
        let server = TestServer::start(vec![Play::ok(body)]);
        assert_eq!(
            post(server.settings()).await.unwrap_err().code(),
            "no-json-body"
        );
    }
}

#[tokio::test]
async fn no_server_is_a_connection_error() {
    let address = TestServer::start(Vec::new()).address;
    let settings = EndpointSettings {
        attempts: 2,
        backoff: Duration::from_millis(1),
        ..EndpointSettings::new(&format!("http://{address}"))
    };
    let error = post(settings).await.unwrap_err();
    assert_eq!(error.code(), "connection", "{error}");
}

#[tokio::test]
async fn the_key_is_read_from_a_private_file_and_never_shown() {
    let key = key_file("sk-secret\n", 0o600);
    let server = TestServer::start(vec![Play::ok("1")]);
    let settings = EndpointSettings {
        key_file: Some(key.path().into()),
        ..server.settings()
    };
    let endpoint = Endpoint::open(settings, never()).unwrap();
    endpoint.post("x", &json!(1), &mut 0).await.unwrap();
    assert!(
        server.requests()[0]
            .head
            .contains("authorization: Bearer sk-secret")
    );
    assert!(!format!("{endpoint:?}").contains("secret"));
}

#[tokio::test]
async fn a_key_that_an_endpoint_repeats_stands_in_no_error() {
    let key = key_file("sk-secret", 0o600);
    let error = async |play: Play| {
        let server = TestServer::start(vec![play]);
        let settings = EndpointSettings {
            key_file: Some(key.path().into()),
            attempts: 1,
            ..server.settings()
        };
        post(settings).await.unwrap_err().to_string()
    };
    for status in [
        "400 Bad Request",
        "401 Unauthorized",
        "500 Internal Server Error",
    ] {
        let text = error(Play::Echo(status)).await;
        assert!(
            text.contains("Bearer …") && !text.contains("secret"),
            "{text}"
        );
    }
    // Nor does its beginning, where what is kept of the answer ends.
    let long = format!("{}sk-secret", "x".repeat(KEPT_ERROR_TEXT - 4));
    let text = error(Play::Answer("401 Unauthorized", "", long)).await;
    assert!(text.contains("xxx…") && !text.contains("sk-"), "{text}");
}

#[test]
fn a_key_that_others_may_read_or_that_would_travel_in_clear_is_refused() {
    let with_key = |url: &str, file: &tempfile::NamedTempFile| {
        setting_error(EndpointSettings {
            key_file: Some(file.path().into()),
            ..EndpointSettings::new(url)
        })
    };
    assert!(with_key("http://127.0.0.1/v1", &key_file("k", 0o644)).contains("chmod 600"));
    assert!(with_key("http://models.example/v1", &key_file("k", 0o600)).contains("https"));
    for text in ["", "two words", "a\nb", "\u{e9}"] {
        assert!(
            with_key("http://[::1]:1/v1", &key_file(text, 0o600)).contains("key_file"),
            "{text}"
        );
    }
}

#[test]
fn a_setting_that_cannot_be_is_named() {
    let settings = || EndpointSettings::new("http://127.0.0.1:8000/v1");
    for url in [
        "",
        "ftp://x/",
        "/v1",
        "http://user:word@host/",
        "http://host/?q=1",
        "http://",
    ] {
        assert!(
            setting_error(EndpointSettings::new(url)).contains("`url`"),
            "{url}"
        );
    }
    for (wrong, key) in [
        (
            EndpointSettings {
                timeout: Duration::ZERO,
                ..settings()
            },
            "timeout",
        ),
        (
            EndpointSettings {
                attempts: 0,
                ..settings()
            },
            "attempts",
        ),
        (
            EndpointSettings {
                backoff: Duration::from_hours(1),
                ..settings()
            },
            "backoff",
        ),
        (
            EndpointSettings {
                requests_per_minute: Some(0),
                ..settings()
            },
            "requests_per_minute",
        ),
        (
            EndpointSettings {
                max_answer: ByteSize(1),
                ..settings()
            },
            "max_answer",
        ),
    ] {
        assert!(setting_error(wrong).contains(key), "{key}");
    }
    let unknown =
        toml::from_str::<EndpointSettings>("url = \"http://x\"\nkeyfile = \"k\"").unwrap_err();
    assert!(unknown.to_string().contains("keyfile"));
}

#[tokio::test(start_paused = true)]
async fn the_rate_limit_spaces_calls() {
    let (_time, endpoint) = timed(EndpointSettings {
        requests_per_minute: Some(30),
        ..EndpointSettings::new("http://127.0.0.1:1/v1")
    });
    let start = Instant::now();
    for turn in 0..4 {
        endpoint.wait_for_turn().await;
        assert_eq!(start.elapsed().as_secs(), 2 * turn);
    }
}

#[tokio::test]
async fn a_call_without_an_answer_is_broken_off_when_its_time_ends_and_none_is_begun_after() {
    let server = TestServer::start(vec![Play::Silence]);
    let (time, endpoint) = timed(server.settings());
    let (body, mut calls) = (json!(1), 0);
    let call = endpoint.post("x", &body, &mut calls);
    let end = async {
        while server.requests().is_empty() {
            tokio::task::yield_now().await;
        }
        time.send_replace(Some(Instant::now()));
    };
    let (answer, ()) = tokio::join!(call, end);
    let error = answer.unwrap_err();
    assert!(error.is_passing() && !error.is_about_the_request());
    assert_eq!((error.code().as_str(), calls), ("stopped", 1));
    let error = endpoint.post("x", &body, &mut calls).await.unwrap_err();
    assert_eq!((error.code().as_str(), calls), ("stopped", 1));
}

#[tokio::test(start_paused = true)]
async fn a_wait_for_a_turn_or_between_two_tries_ends_with_the_time_too() {
    let nobody = TestServer::start(Vec::new()).address;
    for (requests_per_minute, sent) in [(Some(1), 0), (None, 1)] {
        let (time, endpoint) = timed(EndpointSettings {
            requests_per_minute,
            backoff: Duration::from_mins(1),
            ..EndpointSettings::new(&format!("http://{nobody}"))
        });
        // The first turn is another call's.
        endpoint.wait_for_turn().await;
        let (start, mut calls) = (Instant::now(), 0);
        time.send_replace(Some(start + Duration::from_secs(20)));
        let error = endpoint.post("x", &json!(1), &mut calls).await.unwrap_err();
        assert_eq!((error.code().as_str(), calls), ("stopped", sent));
        assert_eq!(start.elapsed().as_secs(), 20);
    }
}

#[tokio::test(start_paused = true)]
async fn a_time_that_is_named_anew_counts() {
    let start = Instant::now();
    let (time, until) = watch::channel(Some(start + Duration::from_hours(1)));
    let until = Until::new(until);
    let mut come = pin!(until.come());
    let soon = timeout(Duration::from_mins(10), come.as_mut());
    assert!(soon.await.is_err());
    time.send_replace(Some(Instant::now()));
    come.await;
    assert_eq!(start.elapsed().as_secs(), 600);
}

#[tokio::test]
async fn an_https_endpoint_is_checked_against_the_authorities_in_the_file() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let signed = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let config = || {
        rustls::ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(
                vec![signed.cert.der().clone()],
                rustls_pki_types::PrivateKeyDer::try_from(signed.signing_key.serialize_der())
                    .unwrap(),
            )
            .unwrap()
    };
    let authority = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(authority.path(), signed.cert.pem()).unwrap();
    let settings = |server: &TestServer, name: &str| EndpointSettings {
        url: format!("https://{name}:{}/v1", server.address.port()),
        ca_file: Some(authority.path().into()),
        attempts: 1,
        ..server.settings()
    };

    let server = TestServer::start_tls(vec![Play::ok("7")], config());
    assert_eq!(
        post(settings(&server, "localhost")).await.unwrap().body,
        json!(7)
    );

    let server = TestServer::start_tls(vec![Play::ok("7")], config());
    let error = post(settings(&server, "127.0.0.1")).await.unwrap_err();
    assert!(error.to_string().contains("TLS"), "{error}");
    assert!(server.requests().is_empty());
}

#[test]
fn a_file_without_authorities_is_refused() {
    let empty = tempfile::NamedTempFile::new().unwrap();
    let error = setting_error(EndpointSettings {
        ca_file: Some(empty.path().into()),
        ..EndpointSettings::new("https://localhost/v1")
    });
    assert!(error.contains("ca_file"), "{error}");
}
