use std::sync::Arc;

use concord_common::job::AdapterPosition;

use super::*;
use crate::{
    backbone::NoHook,
    testing::{backbone, number, tokenizer},
};

const FIRST: Place = Place {
    layer: 1,
    position: AdapterPosition::Ffn,
};
const AFTER_ATTENTION: Place = Place {
    position: AdapterPosition::Attention,
    ..FIRST
};

fn rows(backbone: &Backbone) -> Vec<Encoded> {
    let tokenizer = tokenizer(backbone);
    [
        "rain",
        "the old town and the boat",
        "apples",
        "a letter to the town",
        "clock",
    ]
    .iter()
    .map(|text| tokenizer.encode(text).unwrap())
    .collect()
}

fn setup(settings: CacheSettings) -> (Arc<Backbone>, Vec<Encoded>, PrefixCache) {
    let backbone = backbone(Kind::Float);
    let encoded = rows(&backbone);
    (backbone, encoded, PrefixCache::new(FIRST, settings))
}

fn memory(bytes: u64) -> CacheSettings {
    CacheSettings {
        memory_bytes: bytes,
        ..CacheSettings::default()
    }
}

fn on_disk(folder: &tempfile::TempDir, bytes: u64) -> CacheSettings {
    CacheSettings {
        disk: Some(DiskBudget {
            folder: folder.path().to_owned(),
            bytes,
        }),
        ..memory(0)
    }
}

/// Bytes of a row of `t` tokens at width 24.
fn bytes(t: usize) -> u64 {
    (2 * t * 24 * 4) as u64
}

#[test]
fn a_cached_batch_is_the_uncached_one_at_every_real_token() {
    let backbone = backbone(Kind::Float);
    let encoded = rows(&backbone);
    let off = CacheSettings {
        mode: CacheMode::Off,
        ..CacheSettings::default()
    };
    for first in [FIRST, AFTER_ATTENTION] {
        let mut cache = PrefixCache::new(first, CacheSettings::default());
        let mut uncached = PrefixCache::new(first, off.clone());
        let chosen = [3, 0, 1];
        let want = uncached
            .batch(&backbone, Split::Train, &chosen, &encoded)
            .unwrap();
        let got = cache
            .batch(&backbone, Split::Train, &chosen, &encoded)
            .unwrap();
        assert_eq!(got.mask, want.mask);
        assert_eq!(got.prefix.place, first);
        let real = want.mask.unsqueeze(-1).to_kind(Kind::Float);
        for (got, want) in [
            (&got.prefix.output, &want.prefix.output),
            (&got.prefix.residual, &want.prefix.residual),
        ] {
            assert_eq!(got.size(), want.size());
            let difference = number(&((got - want) * &real).abs().max());
            let largest = number(&want.abs().max());
            assert!(difference < 1e-6 * largest, "{difference} of {largest}");
        }
    }
}

#[test]
fn after_the_attention_its_output_and_the_layers_input_are_kept() {
    let backbone = backbone(Kind::Float);
    let encoded = rows(&backbone);
    let mut cache = PrefixCache::new(AFTER_ATTENTION, CacheSettings::default());
    let mut prefix = || {
        cache
            .batch(&backbone, Split::Train, &[1], &encoded)
            .unwrap()
            .prefix
    };
    let (computed, kept) = (prefix(), prefix());
    assert_eq!(kept.output, computed.output);
    assert_eq!(kept.residual, computed.residual);
    assert_eq!(cache.stats().hits, 1);
    // What enters layer 1, and something else than what is kept before an adapter after the feed-forward network.
    let batch = pad(&[&encoded[1]], backbone.config().pad_id).unwrap();
    let plain = &mut NoHook(AdapterPosition::Attention);
    let embedded = backbone.embed(&batch).unwrap();
    let input = backbone
        .run_layers(&embedded, &batch.mask, 0..1, plain)
        .unwrap();
    assert_eq!(kept.residual, input);
    let after_ffn = backbone.run_prefix(&batch, FIRST).unwrap();
    assert!(number(&(&kept.output - &after_ffn.output).abs().max()) > 1e-2);
    assert!(number(&(&kept.residual - &after_ffn.residual).abs().max()) > 1e-2);
}

#[test]
fn a_rows_bits_do_not_depend_on_its_company_or_on_where_it_was_kept() {
    let folder = tempfile::tempdir().unwrap();
    let backbone = backbone(Kind::Float);
    let encoded = rows(&backbone);
    for first in [FIRST, AFTER_ATTENTION] {
        let mut in_memory = PrefixCache::new(first, CacheSettings::default());
        let mut on_disk = PrefixCache::new(first, on_disk(&folder, 1 << 20));
        let mut nowhere = PrefixCache::new(first, memory(0));
        // Warm the caches in unlike company.
        let _ = in_memory
            .batch(&backbone, Split::Train, &[0, 1, 2, 3, 4], &encoded)
            .unwrap();
        let _ = on_disk
            .batch(&backbone, Split::Train, &[4, 2], &encoded)
            .unwrap();
        let _ = on_disk
            .batch(&backbone, Split::Train, &[1, 3], &encoded)
            .unwrap();
        let batch = |cache: &mut PrefixCache| {
            cache
                .batch(&backbone, Split::Train, &[2, 1, 4], &encoded)
                .unwrap()
                .prefix
        };
        let want = batch(&mut in_memory);
        for cache in [&mut on_disk, &mut nowhere] {
            let got = batch(cache);
            assert_eq!(got.output, want.output, "{first:?}");
            assert_eq!(got.residual, want.residual, "{first:?}");
        }
        assert_eq!(nowhere.stats().hits, 0);
        assert_eq!((on_disk.stats().hits, on_disk.stats().disk_hits), (3, 3));
        let stats = in_memory.stats();
        assert_eq!((stats.memory_hits(), stats.disk_hits), (3, 0));
    }
}

#[test]
fn splits_do_not_get_into_each_others_way() {
    let (backbone, encoded, mut cache) = setup(CacheSettings::default());
    let _ = cache
        .batch(&backbone, Split::Train, &[0], &encoded)
        .unwrap();
    let _ = cache
        .batch(&backbone, Split::Test, &[0], &encoded[1..])
        .unwrap();
    assert_eq!(cache.stats().misses, 2);
}

#[test]
fn neither_memory_nor_disk_grows_beyond_its_budget() {
    let folder = tempfile::tempdir().unwrap();
    let (backbone, encoded, _) = setup(CacheSettings::default());
    let lengths: Vec<u64> = encoded.iter().map(|row| bytes(row.ids.len())).collect();
    let settings = CacheSettings {
        memory_bytes: lengths[0],
        ..on_disk(&folder, lengths[1] + lengths[2])
    };
    let mut cache = PrefixCache::new(FIRST, settings);
    for _ in 0..2 {
        let _ = cache
            .batch(&backbone, Split::Train, &[0, 1, 2, 3, 4], &encoded)
            .unwrap();
    }
    let stats = cache.stats();
    assert_eq!(stats.memory_bytes, lengths[0]);
    assert_eq!(stats.disk_bytes, lengths[1] + lengths[2]);
    assert_eq!((stats.hits, stats.misses), (3, 7));
    assert_eq!((stats.memory_hits(), stats.disk_hits), (1, 2));
}

#[test]
fn a_file_that_cannot_be_read_is_let_go_and_its_rows_are_computed() {
    let folder = tempfile::tempdir().unwrap();
    let (backbone, encoded, mut in_memory) = setup(CacheSettings::default());
    let mut cache = PrefixCache::new(FIRST, on_disk(&folder, 1 << 20));
    let batch = |cache: &mut PrefixCache| {
        cache
            .batch(&backbone, Split::Train, &[0, 1, 2], &encoded)
            .unwrap()
            .prefix
    };
    let want = batch(&mut in_memory);
    let _ = batch(&mut cache);
    let before = cache.stats();
    assert_eq!((before.hits, before.misses), (0, 3));
    // What a disk that loses blocks would do: what was written is not there.
    cache.disk.as_ref().unwrap().file.set_len(0).unwrap();
    for _ in 0..2 {
        let got = batch(&mut cache);
        assert_eq!(got.output, want.output);
        assert_eq!(got.residual, want.residual);
    }
    let since = cache.stats().since(&before);
    assert_eq!((since.hits, since.misses), (0, 6));
    assert_eq!(cache.stats().disk_bytes, 0);
    assert!(cache.disk.is_none());
}

#[test]
fn the_file_has_no_name_that_could_outlive_the_process() {
    let folder = tempfile::tempdir().unwrap();
    let (backbone, encoded, _) = setup(CacheSettings::default());
    let mut cache = PrefixCache::new(FIRST, on_disk(&folder, 1 << 20));
    let _ = cache
        .batch(&backbone, Split::Train, &[0, 1], &encoded)
        .unwrap();
    assert!(cache.stats().disk_bytes > 0);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn a_folder_in_which_no_file_can_be_made_costs_time_and_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (backbone, encoded, mut in_memory) = setup(CacheSettings::default());
    let settings = CacheSettings {
        disk: Some(DiskBudget {
            folder: folder.path().join("missing"),
            bytes: 1 << 20,
        }),
        ..memory(0)
    };
    let mut cache = PrefixCache::new(FIRST, settings);
    let batch = |cache: &mut PrefixCache| {
        cache
            .batch(&backbone, Split::Train, &[0, 1], &encoded)
            .unwrap()
            .prefix
    };
    let want = batch(&mut in_memory);
    for _ in 0..2 {
        let got = batch(&mut cache);
        assert_eq!(got.output, want.output);
        assert_eq!(got.residual, want.residual);
    }
    let stats = cache.stats();
    assert_eq!((stats.hits, stats.misses, stats.disk_bytes), (0, 4, 0));
}
