use proptest::prelude::*;

use super::*;

fn minilm() -> AdapterShape {
    AdapterShape {
        hidden: 384,
        bottleneck: 16,
        layers: (0..6).collect(),
        shared_head: None,
    }
}

#[test]
fn minilm_with_bottleneck_16_has_76_128_parameters() {
    assert_eq!(minilm().layout().unwrap().elements(), 76_128);
}

#[test]
fn a_layout_survives_the_wire() {
    let layout = minilm().layout().unwrap();
    let again = AdapterLayout::from_proto(&layout.to_proto()).unwrap();
    assert_eq!(again, layout);
    assert_eq!(again.digest(), layout.digest());
    assert_eq!(layout.check_same(&layout.to_proto()), Ok(()));
}

#[test]
fn the_first_adapter_repeats_and_other_layers_do_not_change_it() {
    let one = minilm()
        .initial_payload(InitialScale::default(), Seed(1))
        .unwrap();
    assert_eq!(
        one,
        minilm()
            .initial_payload(InitialScale::default(), Seed(1))
            .unwrap()
    );
    assert_ne!(
        one,
        minilm()
            .initial_payload(InitialScale::default(), Seed(2))
            .unwrap()
    );
    let top = AdapterShape {
        layers: vec![4, 5],
        ..minilm()
    };
    let top_payload = top
        .initial_payload(InitialScale::default(), Seed(1))
        .unwrap();
    let name = "layer.5.up.weight";
    assert_eq!(
        split_payload(&top.layout().unwrap(), &top_payload).unwrap()[name],
        split_payload(&minilm().layout().unwrap(), &one).unwrap()[name],
    );
}

#[test]
fn the_first_adapter_is_finite_and_has_the_stated_scale() {
    let payload = minilm()
        .initial_payload(InitialScale::default(), Seed(42))
        .unwrap();
    let values = decode_f32(&payload).unwrap();
    assert!(values.iter().all(|value| value.is_finite()));
    let up = &split_payload(&minilm().layout().unwrap(), &payload).unwrap()["layer.0.up.weight"];
    let std = (up.iter().map(|x| x * x).sum::<f32>() / up.len() as f32).sqrt();
    assert!((std - 1e-3).abs() < 1e-4, "{std}");
}

#[test]
fn each_difference_from_the_layout_has_its_own_code() {
    let layout = minilm().layout().unwrap();
    let code_after = |change: &dyn Fn(&mut v1::AdapterLayout)| {
        let mut proto = layout.to_proto();
        change(&mut proto);
        layout.check_same(&proto).unwrap_err().code
    };
    assert_eq!(
        code_after(&|l| {
            l.tensors.pop();
        }),
        ErrorCode::TensorCount
    );
    assert_eq!(
        code_after(&|l| l.tensors.swap(0, 1)),
        ErrorCode::TensorOrder
    );
    assert_eq!(
        code_after(&|l| l.tensors[3].name = "other".into()),
        ErrorCode::TensorName
    );
    assert_eq!(
        code_after(&|l| l.tensors[3].shape[0] = 1),
        ErrorCode::TensorShape
    );
    assert_eq!(
        code_after(&|l| l.tensors[3].dtype = 0),
        ErrorCode::TensorDtype
    );
}

#[test]
fn layouts_that_are_too_large_or_repeat_a_name_are_refused() {
    let refused = |tensors| AdapterLayout::new(tensors).is_err();
    assert!(refused(vec![]));
    assert!(refused(vec![TensorSpec::new("a", &[u64::MAX, u64::MAX])]));
    assert!(refused(vec![
        TensorSpec::new("a", &[MAX_ELEMENTS]),
        TensorSpec::new("b", &[1])
    ]));
    assert!(refused(vec![
        TensorSpec::new("a", &[1]),
        TensorSpec::new("a", &[1])
    ]));
    assert!(refused(vec![TensorSpec::new("a", &[0])]));
    assert!(refused(vec![TensorSpec::new("a", &[])]));
    assert!(refused(vec![TensorSpec::new("a/b", &[1])]));
    assert!(refused(vec![TensorSpec::new("x".repeat(129), &[1])]));
    assert!(refused(
        (0..=MAX_TENSORS)
            .map(|i| TensorSpec::new(format!("t{i}"), &[1]))
            .collect()
    ));
}

proptest! {
    #[test]
    fn elements_survive_the_payload(values in proptest::collection::vec(any::<f32>(), 0..200)) {
        let decoded = decode_f32(&encode_f32(&values)).unwrap();
        prop_assert_eq!(
            decoded.iter().map(|x| x.to_bits()).collect::<Vec<_>>(),
            values.iter().map(|x| x.to_bits()).collect::<Vec<_>>()
        );
    }

    #[test]
    fn no_list_of_tensors_from_a_peer_makes_it_panic(
        tensors in proptest::collection::vec((".{0,20}", proptest::collection::vec(any::<u64>(), 0..6), any::<i32>()), 0..10)
    ) {
        let proto = v1::AdapterLayout {
            tensors: tensors.into_iter().map(|(name, shape, dtype)| v1::TensorInfo { name, shape, dtype }).collect(),
        };
        let _ = AdapterLayout::from_proto(&proto);
        prop_assert!(minilm().layout().unwrap().check_same(&proto).is_err());
    }
}
