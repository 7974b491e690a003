use proptest::prelude::*;

use super::*;

fn sample() -> Image {
    let pixels = (0..5 * 3 * 3)
        .map(|value| (value * 37 % 256) as u8)
        .collect();
    Image::new(5, 3, pixels).unwrap()
}

/// A PNG file of any header and contents, with a true checksum for each chunk.
fn forged_png(width: u32, height: u32, depth: u8, colour: u8, data: &[u8]) -> Vec<u8> {
    let mut header = Vec::new();
    header.extend(width.to_be_bytes());
    header.extend(height.to_be_bytes());
    header.extend([depth, colour, 0, 0, 0]);
    let mut file = b"\x89PNG\r\n\x1a\n".to_vec();
    for (name, content) in [
        (b"IHDR", header.as_slice()),
        (b"IDAT", data),
        (b"IEND", &[]),
    ] {
        file.extend((content.len() as u32).to_be_bytes());
        file.extend(name);
        file.extend(content);
        let mut checksum = u32::MAX;
        for byte in name.iter().chain(content) {
            checksum ^= u32::from(*byte);
            for _ in 0..8 {
                checksum = (checksum >> 1) ^ (0xEDB8_8320 & (checksum & 1).wrapping_neg());
            }
        }
        file.extend((!checksum).to_be_bytes());
    }
    file
}

#[test]
fn an_image_survives_its_png_file() {
    let image = sample();
    assert_eq!(Image::from_png(&image.to_png().unwrap()), Ok(image));
}

#[test]
fn the_same_pixels_in_another_shape_have_another_address() {
    let image = sample();
    let turned = Image::new(3, 5, image.pixels().to_vec()).unwrap();
    assert_ne!(image.digest(), turned.digest());
    assert_eq!(image.digest(), sample().digest());
}

#[test]
fn pixels_that_do_not_fill_the_sides_are_refused() {
    assert!(matches!(
        Image::new(2, 2, vec![0; 11]),
        Err(ImageError::Length {
            expected: 12,
            found: 11,
            ..
        })
    ));
    for (width, height) in [(0, 1), (1, 0), (MAX_SIDE + 1, 1), (1, u32::MAX)] {
        assert_eq!(
            Image::filled(width, height, [0; 3]),
            Err(ImageError::Sides { width, height })
        );
    }
}

#[test]
fn a_huge_png_is_refused_by_its_header() {
    let bomb = forged_png(1 << 30, 1 << 30, 8, 2, &[0; 64]);
    assert_eq!(
        Image::from_png(&bomb),
        Err(ImageError::Sides {
            width: 1 << 30,
            height: 1 << 30
        })
    );
    assert_eq!(
        Image::from_png(&vec![0; MAX_PNG_BYTES + 1]),
        Err(ImageError::FileSize(MAX_PNG_BYTES + 1))
    );
}

#[test]
fn a_png_that_is_cut_short_is_refused() {
    let whole = sample().to_png().unwrap();
    for length in 0..whole.len() - 12 {
        assert!(Image::from_png(&whole[..length]).is_err(), "{length}");
    }
}

#[test]
fn transparent_pixels_are_laid_on_white() {
    let mut file = Vec::new();
    let mut encoder = png::Encoder::new(&mut file, 2, 1);
    encoder.set_color(png::ColorType::Rgba);
    encoder
        .write_header()
        .unwrap()
        .write_image_data(&[10, 20, 30, 255, 200, 0, 0, 0])
        .unwrap();
    let image = Image::from_png(&file).unwrap();
    assert_eq!(image.at(0, 0), [10, 20, 30]);
    assert_eq!(image.at(1, 0), [255, 255, 255]);
}

#[test]
fn grey_and_sixteen_bit_files_are_read_as_rgb() {
    for (colour, depth, data) in [
        (png::ColorType::Grayscale, png::BitDepth::Eight, vec![128]),
        (
            png::ColorType::Rgb,
            png::BitDepth::Sixteen,
            vec![128, 0, 128, 0, 128, 0],
        ),
    ] {
        let mut file = Vec::new();
        let mut encoder = png::Encoder::new(&mut file, 1, 1);
        encoder.set_color(colour);
        encoder.set_depth(depth);
        encoder
            .write_header()
            .unwrap()
            .write_image_data(&data)
            .unwrap();
        assert_eq!(Image::from_png(&file).unwrap().at(0, 0), [128; 3]);
    }
}

#[test]
fn a_thumbnail_holds_the_means_of_its_cells() {
    let mut image = Image::filled(4, 4, [0; 3]).unwrap();
    for (x, y) in [(0, 0), (1, 0), (0, 1), (1, 1)] {
        image.put(x, y, [255, 0, 0]);
    }
    let cells = image.thumbnail(2);
    assert_eq!(cells[0], [1.0, 0.0, 0.0]);
    assert_eq!(cells[1..], [[0.0; 3]; 3]);
    assert_eq!(
        Image::filled(1, 1, [255; 3]).unwrap().thumbnail(8),
        vec![[1.0; 3]; 64]
    );
}

proptest! {
    #[test]
    fn any_image_survives_its_png_file(width in 1_u32..20, height in 1_u32..20, seed: u8) {
        let pixels = (0..width * height * 3).map(|i| (i as u8).wrapping_mul(seed)).collect();
        let image = Image::new(width, height, pixels).unwrap();
        prop_assert_eq!(Image::from_png(&image.to_png().unwrap()), Ok(image));
    }

    #[test]
    fn hostile_bytes_never_crash_the_reader(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _ = Image::from_png(&bytes);
    }

    #[test]
    fn hostile_headers_and_contents_never_crash_the_reader(
        width in prop_oneof![0_u32..5000, any::<u32>()],
        height in prop_oneof![0_u32..5000, any::<u32>()],
        depth in prop_oneof![Just(1_u8), Just(2), Just(4), Just(8), Just(16), any::<u8>()],
        colour in prop_oneof![Just(0_u8), Just(2), Just(3), Just(4), Just(6), any::<u8>()],
        data in proptest::collection::vec(any::<u8>(), 0..200),
    ) {
        if let Ok(image) = Image::from_png(&forged_png(width, height, depth, colour, &data)) {
            prop_assert!(image.width() <= MAX_SIDE && image.height() <= MAX_SIDE);
        }
    }

    #[test]
    fn a_changed_byte_never_crashes_the_reader(place in 0_usize..70, value: u8) {
        let mut file = sample().to_png().unwrap();
        let length = file.len();
        file[place % length] = value;
        let _ = Image::from_png(&file);
    }
}

#[test]
fn an_image_shrinks_by_a_whole_factor_to_the_means_of_its_pixels() {
    let mut image = Image::filled(5, 4, [10, 20, 30]).unwrap();
    image.put(0, 0, [14, 20, 30]);
    image.put(4, 3, [10, 23, 30]);
    let small = image.clone().shrunk(3);
    assert_eq!((small.width(), small.height()), (3, 2));
    assert_eq!(small.at(0, 0), [11, 20, 30]);
    assert_eq!(small.at(1, 1), [10, 20, 30]);
    // The last column stands for one column alone: 20 and 23 give 21.5.
    assert_eq!(small.at(2, 1), [10, 22, 30]);
    assert_eq!(image.clone().shrunk(5), image);
    assert_eq!(image.shrunk(1).width(), 1);
}
