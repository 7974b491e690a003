use super::*;

const SPEC: &str = "kind = \"federated-training\"\n";

fn binding() -> Binding {
    Binding {
        job: "job-1".parse().unwrap(),
        silo: "clinic-a".parse().unwrap(),
        backbone: Digest::of(b"weights"),
        spec: Digest::of(SPEC.as_bytes()),
    }
}

fn header(record: Record) -> Header {
    Header {
        record,
        binding: binding(),
        round: RoundNumber(2),
        task: "main".to_owned(),
        metrics: BTreeMap::from([(
            "test".to_owned(),
            BTreeMap::from([("accuracy".to_owned(), 0.875)]),
        )]),
        spec_toml: SPEC.to_owned(),
    }
}

fn vault_with_state(body: &[u8]) -> (tempfile::TempDir, Vault, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let vault = Vault::open(folder.path()).unwrap();
    vault.save(&header(Record::State), body).unwrap();
    let file = vault.file(&binding().job, Record::State);
    (folder, vault, file)
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

/// In what a refused file is foreign.
fn foreign(error: VaultError) -> &'static str {
    match error {
        VaultError::Foreign { what, .. } => what,
        other => panic!("{other}"),
    }
}

#[test]
fn a_record_comes_back_as_it_was_saved() {
    let (_folder, vault, _) = vault_with_state(b"private tensors");
    let (found, body) = vault.load(&binding(), Record::State).unwrap().unwrap();
    assert_eq!(found, header(Record::State));
    assert_eq!(body, b"private tensors");
    assert!(vault.load(&binding(), Record::Model).unwrap().is_none());
    assert_eq!(vault.jobs().unwrap(), vec![binding().job]);
}

#[test]
fn files_are_0600_in_folders_of_0700() {
    let (folder, _vault, file) = vault_with_state(b"x");
    assert_eq!(mode(&file), 0o600);
    assert_eq!(mode(file.parent().unwrap()), 0o700);
    assert_eq!(mode(&folder.path().join("vault")), 0o700);
}

#[test]
fn a_vault_that_others_may_read_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vault");
    fs::create_dir(&path).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    let error = Vault::open(folder.path()).unwrap_err();
    assert!(error.to_string().contains("chmod 700"), "{error}");
}

#[test]
fn a_file_cut_at_any_byte_is_refused_by_name() {
    let (_folder, vault, file) = vault_with_state(b"private tensors");
    let whole = fs::read(&file).unwrap();
    for length in 0..whole.len() {
        fs::write(&file, &whole[..length]).unwrap();
        let error = vault.load(&binding(), Record::State).unwrap_err();
        assert!(
            matches!(error, VaultError::Torn { .. }),
            "{length}: {error}"
        );
        assert!(error.to_string().contains("state.vault"), "{error}");
    }
}

#[test]
fn bytes_added_at_the_end_are_refused() {
    let (_folder, vault, file) = vault_with_state(b"private tensors");
    let mut longer = fs::read(&file).unwrap();
    longer.push(0);
    fs::write(&file, longer).unwrap();
    let error = vault.load(&binding(), Record::State).unwrap_err();
    assert!(matches!(error, VaultError::Torn { .. }), "{error}");
}

#[test]
fn a_file_with_any_byte_changed_is_refused_by_name() {
    let (_folder, vault, file) = vault_with_state(b"private tensors");
    let whole = fs::read(&file).unwrap();
    for place in 0..whole.len() {
        let mut changed = whole.clone();
        changed[place] ^= 0x10;
        fs::write(&file, &changed).unwrap();
        let error = vault.load(&binding(), Record::State).unwrap_err();
        let expected = match place {
            0..12 => matches!(error, VaultError::Unreadable { .. }),
            12..24 => matches!(error, VaultError::Torn { .. }),
            _ => matches!(error, VaultError::Altered { .. }),
        };
        assert!(expected, "{place}: {error}");
        assert!(error.to_string().contains("state.vault"), "{error}");
    }
}

#[test]
fn a_file_of_another_silo_backbone_or_specification_is_foreign() {
    let (_folder, vault, _) = vault_with_state(b"private tensors");
    let others = [
        (
            "silo",
            Binding {
                silo: "clinic-b".parse().unwrap(),
                ..binding()
            },
        ),
        (
            "backbone",
            Binding {
                backbone: Digest::of(b"other"),
                ..binding()
            },
        ),
        (
            "specification",
            Binding {
                spec: Digest::of(b"other"),
                ..binding()
            },
        ),
    ];
    for (want, other) in others {
        assert_eq!(
            foreign(vault.load(&other, Record::State).unwrap_err()),
            want
        );
    }
}

#[test]
fn a_vault_of_another_adapter_position_is_foreign() {
    let folder = tempfile::tempdir().unwrap();
    let vault = Vault::open(folder.path()).unwrap();
    let spec_of = |position: &str| format!("{SPEC}[adapter]\n{position}");
    let bound = |text: &str| Binding {
        spec: Digest::of(text.as_bytes()),
        ..binding()
    };
    let kept = spec_of("");
    let state = Header {
        binding: bound(&kept),
        spec_toml: kept.clone(),
        ..header(Record::State)
    };
    vault.save(&state, b"private tensors").unwrap();
    assert!(vault.load(&bound(&kept), Record::State).unwrap().is_some());
    let other = spec_of("position = \"attention\"\n");
    let error = vault.load(&bound(&other), Record::State).unwrap_err();
    assert_eq!(foreign(error), "specification");
}

#[test]
fn a_file_moved_from_another_job_or_record_is_foreign() {
    let (_folder, vault, file) = vault_with_state(b"private tensors");
    let other: JobId = "job-2".parse().unwrap();
    private_folder(vault.file(&other, Record::State).parent().unwrap()).unwrap();
    fs::copy(&file, vault.file(&other, Record::State)).unwrap();
    fs::copy(&file, vault.file(&binding().job, Record::Model)).unwrap();
    for (error, want) in [
        (vault.read(&other, Record::State).unwrap_err(), "job"),
        (
            vault.read(&binding().job, Record::Model).unwrap_err(),
            "record",
        ),
    ] {
        assert_eq!(foreign(error), want);
    }
}

#[test]
fn a_header_whose_specification_is_not_the_bound_one_is_foreign() {
    let folder = tempfile::tempdir().unwrap();
    let vault = Vault::open(folder.path()).unwrap();
    let lying = Header {
        spec_toml: "kind = \"other\"".to_owned(),
        ..header(Record::State)
    };
    vault.save(&lying, b"x").unwrap();
    let error = vault.load(&binding(), Record::State).unwrap_err();
    assert_eq!(foreign(error), "specification");
}
