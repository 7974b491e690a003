use clap::{CommandFactory as _, Parser as _};

use super::{connect::Connection, *};

mod artaug;

fn resolve(words: &[&str], variables: &[(&str, &str)]) -> Result<Connection, CliError> {
    let arguments =
        Arguments::try_parse_from(["concord"].iter().chain(words).chain(&["silo", "list"]))
            .unwrap();
    Connection::resolve(&arguments.connection, |name| {
        variables
            .iter()
            .find(|(known, _)| *known == name)
            .map(|(_, value)| (*value).to_owned())
    })
}

#[test]
fn the_command_line_is_consistent() {
    Arguments::command().debug_assert();
}

#[test]
fn options_go_before_variables_and_variables_before_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("concord.toml");
    std::fs::write(
        &file,
        "server = \"file:1\"\ncertificate = \"f.crt\"\nkey = \"f.key\"\nca = \"f.ca\"\n",
    )
    .unwrap();
    let found = resolve(
        &["--config", file.to_str().unwrap(), "--key", "o.key"],
        &[("CONCORD_KEY", "v.key"), ("CONCORD_SERVER", "variable:2")],
    )
    .unwrap();
    assert_eq!(found.url, "https://variable:2");
    assert_eq!(found.files.key, PathBuf::from("o.key"));
    assert_eq!(found.files.ca, folder.path().join("f.ca"));
}

#[test]
fn what_is_missing_is_named_with_its_option_and_its_variable() {
    let error = resolve(&["--server", "here:1"], &[]).unwrap_err();
    assert_eq!(error.exit(), Exit::Usage);
    let text = error.to_string();
    assert!(
        text.contains("--certificate") && text.contains("CONCORD_CERTIFICATE"),
        "{text}"
    );
}

#[test]
fn an_unknown_key_of_the_file_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("concord.toml");
    std::fs::write(&file, "sever = \"here:1\"\n").unwrap();
    let error = resolve(&["--config", file.to_str().unwrap()], &[]).unwrap_err();
    assert!(error.to_string().contains("sever"), "{error}");
}

#[test]
fn each_kind_of_failure_has_an_exit_code_of_its_own() {
    for (code, exit) in [
        (ErrorCode::UnknownJob, Exit::NotFound),
        (ErrorCode::UnknownRound, Exit::NotFound),
        (ErrorCode::UnknownSilo, Exit::NotFound),
        (ErrorCode::UnknownObject, Exit::NotFound),
        (ErrorCode::WrongKind, Exit::Refused),
        (ErrorCode::WrongEnrollment, Exit::Refused),
        (ErrorCode::InvalidJobSpec, Exit::Refused),
        (ErrorCode::Busy, Exit::Busy),
        (ErrorCode::ShuttingDown, Exit::Busy),
        (ErrorCode::WrongRole, Exit::Refused),
    ] {
        let error = CliError::from(Status::from(Refusal::new(code, "because")));
        assert_eq!(error.exit(), exit, "{code}");
        assert!(error.to_string().contains("because"));
    }
    let away = CliError::from(Status::unavailable("no route"));
    assert_eq!(away.exit(), Exit::Unreachable);
}

#[test]
fn the_page_and_the_help_list_every_exit_code() {
    let expected: Vec<(String, String)> = Exit::ALL
        .iter()
        .map(|exit| ((*exit as u8).to_string(), exit.meaning().to_owned()))
        .collect();
    let page: Vec<(String, String)> = include_str!("../../../docs/operations.md")
        .lines()
        .skip_while(|line| !line.starts_with("| Exit code of `concord` |"))
        .skip(2)
        .map_while(|line| {
            line.strip_prefix("| `")?
                .strip_suffix(" |")?
                .split_once("` | ")
        })
        .map(|(code, meaning)| (code.to_owned(), meaning.to_owned()))
        .collect();
    assert_eq!(page, expected);
    let help = Arguments::command().render_help().to_string();
    let (_, listed) = help.split_once("Exit codes:\n").unwrap();
    let listed: Vec<(String, String)> = listed
        .lines()
        .filter_map(|line| line.trim().split_once(' '))
        .map(|(code, meaning)| (code.to_owned(), meaning.trim().to_owned()))
        .collect();
    assert_eq!(listed, expected);
}

#[test]
fn a_reader_that_has_seen_enough_is_no_failure() {
    let closed = CliError::Output(std::io::ErrorKind::BrokenPipe.into());
    assert_eq!(closed.exit(), Exit::Done);
    let full = CliError::Output(std::io::ErrorKind::StorageFull.into());
    assert_eq!(full.exit(), Exit::Usage);
}

mod against_a_server {
    use concord_common::Role;
    use concord_proto::v1::{self, JobState, federation_service_client::FederationServiceClient};

    use super::*;
    use crate::tests::harness::{World, spec};

    /// Runs a command as operator `olga`; gives exit code and output.
    pub(super) async fn concord(world: &World, words: &[&str]) -> (Exit, String) {
        let files = world.issue(Role::Operator, "olga");
        let server = world.server().addr.to_string();
        let connection = [
            "concord",
            "--server",
            &server,
            "--certificate",
            files.certificate.to_str().unwrap(),
            "--key",
            files.key.to_str().unwrap(),
            "--ca",
            files.ca.to_str().unwrap(),
        ];
        let arguments = Arguments::try_parse_from(connection.iter().chain(words)).unwrap();
        let mut out = Vec::new();
        let exit = match commands::run(&arguments, &mut out).await {
            Ok(exit) => exit,
            Err(error) => {
                out.extend(error.to_string().bytes());
                error.exit()
            }
        };
        (exit, String::from_utf8(out).unwrap())
    }

    pub(super) fn json(text: &str) -> serde_json::Value {
        serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    #[tokio::test]
    async fn a_job_is_submitted_watched_and_shown() {
        let world = World::start().await;
        let [mut a] = world.silos(["a"]).await;
        let file = world.folder.path().join("job.toml");
        std::fs::write(&file, spec(1, 1, "")).unwrap();
        let file = file.to_str().unwrap();
        let (exit, text) = concord(
            &world,
            &["job", "submit", file, "--request-id", "once", "--json"],
        )
        .await;
        assert_eq!(exit, Exit::Done, "{text}");
        let job_id = json(&text)["job"]["job_id"].as_str().unwrap().to_owned();
        assert_eq!(json(&text)["job"]["algorithm"], "fedavg");
        let (_, again) = concord(
            &world,
            &["job", "submit", file, "--request-id", "once", "--json"],
        )
        .await;
        assert_eq!(json(&again)["existed"], true);

        let work = async { a.contribute(&job_id, 1, 1.0, 1).await };
        let watching = ["--json", "job", "watch", &job_id];
        let ((exit, lines), _) = tokio::join!(concord(&world, &watching), work);
        assert_eq!(exit, Exit::Done, "{lines}");
        let last = json(lines.lines().last().unwrap());
        assert_eq!(last["job"]["state"], "succeeded");
        assert_eq!(last["silos"][0]["accepted"], 1);

        let (exit, text) = concord(&world, &["job", "show", &job_id, "--json"]).await;
        assert_eq!(
            (exit, &json(&text)["job"]["state"]),
            (Exit::Done, &"succeeded".into())
        );
        for (words, part) in [
            (&["job", "list"][..], "succeeded"),
            (&["job", "show", &job_id], "accepted"),
            (&["job", "watch", &job_id], "has succeeded"),
            (&["round", "list", &job_id], "published"),
            (&["round", "show", &job_id, "1"], "accepted"),
            (&["silo", "list"], "active"),
        ] {
            let (exit, text) = concord(&world, words).await;
            assert_eq!(exit, Exit::Done, "{words:?}: {text}");
            assert!(text.contains(part), "{words:?}: {text}");
        }
    }

    #[tokio::test]
    async fn a_silo_that_declines_says_why() {
        let world = World::start().await;
        let [mut a, _b] = world.silos(["a", "b"]).await;
        let job_id = world.submit(&spec(1, 1, "max_time = \"1day\"")).await;
        a.wait_for_round(&job_id, 1).await;
        let request = v1::DeclineJobRequest {
            job_id: job_id.clone(),
            reason: "BAD_DATA".to_owned(),
            message: "row 7 has no label".to_owned(),
        };
        a.client.decline_job(request).await.unwrap();
        let (exit, text) = concord(&world, &["job", "show", &job_id]).await;
        assert_eq!(exit, Exit::Done, "{text}");
        assert!(text.contains("a declined: row 7 has no label\n"), "{text}");
        assert!(!text.contains("b declined"), "{text}");
        let (_, text) = concord(&world, &["job", "show", &job_id, "--json"]).await;
        let silos = &json(&text)["silos"];
        assert_eq!(silos[0]["message"], "row 7 has no label");
        assert_eq!(silos[1]["message"], serde_json::Value::Null);
    }

    #[tokio::test]
    async fn the_exit_code_says_what_happened() {
        let mut world = World::start().await;
        let job_id = world.submit(&spec(1, 1, "")).await;
        world.wait_for_state(&job_id, JobState::Running).await;
        let (exit, text) = concord(&world, &["job", "cancel", &job_id]).await;
        assert_eq!(exit, Exit::Done, "{text}");
        assert_eq!(
            concord(&world, &["job", "watch", &job_id]).await.0,
            Exit::Cancelled
        );
        assert_eq!(
            concord(&world, &["job", "show", "nothing"]).await.0,
            Exit::NotFound
        );
        assert_eq!(
            concord(&world, &["round", "show", &job_id, "1"]).await.0,
            Exit::NotFound
        );
        let (exit, text) = concord(&world, &["job", "submit", "/no/such/file"]).await;
        assert_eq!(exit, Exit::Usage, "{text}");
        let file = world.folder.path().join("job.toml");
        std::fs::write(&file, spec(1, 1, "colour = 1")).unwrap();
        let (exit, text) = concord(&world, &["job", "submit", file.to_str().unwrap()]).await;
        assert_eq!(exit, Exit::Refused);
        assert!(text.contains("colour"), "{text}");
        // A silo's certificate is no operator's.
        let silo = world.issue(Role::Silo, "a");
        let other = [
            "--certificate",
            silo.certificate.to_str().unwrap(),
            "--key",
            silo.key.to_str().unwrap(),
        ];
        let addr = world.server().addr;
        let arguments = Arguments::try_parse_from(
            [
                "concord",
                "--server",
                &addr.to_string(),
                "--ca",
                silo.ca.to_str().unwrap(),
                "silo",
                "list",
            ]
            .iter()
            .copied()
            .chain(other),
        )
        .unwrap();
        let error = commands::run(&arguments, &mut Vec::new())
            .await
            .unwrap_err();
        assert_eq!(error.exit(), Exit::Usage);
        assert!(error.to_string().contains("operator"), "{error}");

        let files = world.issue(Role::Operator, "olga");
        world.stop().await;
        let arguments = Arguments::try_parse_from([
            "concord",
            "--server",
            &addr.to_string(),
            "--certificate",
            files.certificate.to_str().unwrap(),
            "--key",
            files.key.to_str().unwrap(),
            "--ca",
            files.ca.to_str().unwrap(),
            "silo",
            "list",
        ])
        .unwrap();
        let error = commands::run(&arguments, &mut Vec::new())
            .await
            .unwrap_err();
        assert_eq!(error.exit(), Exit::Unreachable, "{error}");
        assert!(error.to_string().contains("cannot be reached"), "{error}");
    }
    #[tokio::test]
    async fn silos_are_approved_suspended_and_revoked() {
        let world = World::start_with(|config| {
            config.enrollment = crate::config::EnrollmentPolicy::Manual;
        })
        .await;
        let mut a = FederationServiceClient::new(world.channel(Role::Silo, "a"));
        let info = v1::GetServerInfoRequest {};
        a.get_server_info(info).await.unwrap_err();
        let (exit, text) = concord(&world, &["silo", "list"]).await;
        assert_eq!(exit, Exit::Done, "{text}");
        assert!(text.contains("pending"), "{text}");
        for (word, exit, part) in [
            ("suspend", Exit::Refused, "pending"),
            ("approve", Exit::Done, "active"),
            ("approve", Exit::Done, "active"),
            ("suspend", Exit::Done, "suspended"),
            ("approve", Exit::Done, "suspended"),
            ("revoke", Exit::Done, "revoked"),
            ("approve", Exit::Refused, "revoked"),
        ] {
            let (found, text) = concord(&world, &["silo", word, "a"]).await;
            assert_eq!(found, exit, "{word}: {text}");
            assert!(text.contains(part), "{word}: {text}");
        }
        let (exit, text) = concord(&world, &["silo", "revoke", "a", "--json"]).await;
        assert_eq!(exit, Exit::Done, "{text}");
        let answer = json(&text);
        assert_eq!(answer["silo"]["silo_id"], "a");
        assert_eq!(answer["silo"]["enrollment"], "revoked");
        assert_eq!(answer["before"], "revoked");
        let (exit, text) = concord(&world, &["silo", "approve", "nobody"]).await;
        assert_eq!(exit, Exit::NotFound);
        assert!(text.contains("`nobody`"), "{text}");
        let (exit, text) = concord(&world, &["silo", "approve", "Not A Name"]).await;
        assert_eq!(exit, Exit::Refused, "{text}");
    }
}
