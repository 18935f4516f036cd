//! Types that a source has of its own, and the values that they are tried with.

use super::Tried;

/// Types that the source has of its own, and that the target lacks.
#[rustfmt::skip] // One line or two a type.
pub(super) const OWN_TYPES: &str = r#"
    CREATE SCHEMA "My Types";
    CREATE TYPE mood AS ENUM ('sad', 'it''s ok', 'very "happy"', '');
    CREATE TYPE "My Types"."Colour" AS ENUM ('red', 'green, blue', '{}', 'NULL');
    CREATE DOMAIN positive AS int CHECK (VALUE > 0) CONSTRAINT small CHECK (VALUE < 1000);
    CREATE DOMAIN tiny AS positive CHECK (VALUE < 10);
    CREATE DOMAIN "My Types".short AS varchar(5) NOT NULL DEFAULT 'x';
    CREATE DOMAIN good_mood AS mood CHECK (VALUE <> 'sad');
    CREATE DOMAIN numbers AS int[] CHECK (array_length(VALUE, 1) < 5);
    CREATE DOMAIN moods AS mood[];
    CREATE DOMAIN tinies AS tiny[];
    CREATE DOMAIN future AS tstzrange CHECK (lower(VALUE) > '2020-01-01 00:00+00');
    CREATE TYPE pair AS (a int, b text);
    CREATE DOMAIN far_pair AS pair CHECK ((VALUE).a > 10);
    CREATE FUNCTION is_even(n int) RETURNS boolean IMMUTABLE LANGUAGE sql AS 'SELECT n % 2 = 0';
    CREATE DOMAIN even AS int CHECK (is_even(VALUE));
    CREATE TYPE nest AS (p pair, m mood, l int[], at timestamptz, f double precision, j json, r tstzrange);
    CREATE TYPE span AS RANGE (subtype = double precision, multirange_type_name = spans);
"#;

/// Those types with values.
#[rustfmt::skip] // One line or two a type.
pub(super) const OWN: &[Tried] = &[
    ("public.moods", &[r#"'{sad,"it''s ok"}'"#]),
    ("public.far_pair", &["ROW(11, 'x')"]),
    ("public.even", &["2"]),
    ("public.mood", &["'sad'", "'it''s ok'", "'very \"happy\"'", "''"]),
    ("public.mood[]", &["'{}'", r#"ARRAY['it''s ok', 'very "happy"', '', NULL]::public.mood[]"#,
        r#"'[2:3][0:0]={{sad},{""}}'"#]),
    ("\"My Types\".\"Colour\"", &["'green, blue'", "'{}'", "'NULL'"]),
    ("\"My Types\".\"Colour\"[]", &[r#"'{"green, blue","NULL",NULL,"{}"}'"#]),
    ("public.positive", &["1", "999"]),
    ("public.positive[]", &["'{1,2,NULL}'", "'{{1,2},{3,4}}'"]),
    ("public.tiny", &["9"]),
    ("public.tinies", &["'{9,NULL,1}'", "'{}'"]),
    ("public.tinies[]", &[r#"'{"{1,NULL}","{}",NULL}'"#]),
    ("public.good_mood", &["'it''s ok'"]),
    ("public.good_mood[]", &[r#"'{"it''s ok",NULL,""}'"#]),
    ("public.numbers", &["'{1,NULL,3}'", "'[0:1]={1,2}'"]),
    ("public.numbers[]", &[r#"'{"{1,2}",NULL,"[0:0]={3}"}'"#]),
    ("public.future", &["'[2024-01-01 00:00+00,)'"]),
    ("public.pair", &["ROW(1, 'x, y')", r#"ROW(NULL, E'a"\\b')"#, "ROW(NULL, NULL)", "ROW(0, '')",
        "ROW(1, E' (\\n) ')"]),
    ("public.pair[]", &[r#"ARRAY[ROW(1, 'a'), ROW(2, '"(b'), ROW(3, NULL), NULL]::public.pair[]"#]),
    ("public.far_pair[]", &["ARRAY[ROW(12, 'a,b')]::public.far_pair[]"]),
    ("public.nest", &[
        r#"ROW(ROW(1, 'a"b'), 'it''s ok', '{{1,2},{3,4}}', '0044-03-15 12:00:00.5+00 BC', 'NaN', '{"a": "\\" }',
            '[2024-01-01 00:00+00,)')"#,
        "ROW(NULL, '', '{}', 'infinity', '-0', 'null', 'empty')",
        "ROW(NULL, NULL, NULL, NULL, NULL, NULL, NULL)",
    ]),
    ("public.nest[]", &["ARRAY[ROW(ROW(1, ','), 'sad', '{1}', NULL, 0.1, NULL, NULL)]::public.nest[]"]),
    ("public.span", &["'[1e-300,0.1]'", "'empty'", "'(,Infinity)'", "'[NaN,NaN]'"]),
    ("public.spans", &["'{}'", "'{[0.1,0.2),[1,)}'"]),
    ("public.span[]", &["'{\"[1,2)\",empty}'"]),
];

/// Types that the target has before anything arrives.
pub(super) const KNOWN_TYPES: &str = r#"
    CREATE SCHEMA known;
    CREATE TYPE known.mood AS ENUM ('sad', 'b,c');
    CREATE TYPE known.pair AS (a int, b text, c text[]);
    CREATE DOMAIN known.far_pair AS known.pair CHECK ((VALUE).a > 10);
    CREATE DOMAIN known.pairs AS known.pair[];
    CREATE DOMAIN known.moods AS known.mood[];
    CREATE TYPE known.nest AS (p known.pair, m known.mood, ps known.pairs, at timestamptz, r tstzrange);
    CREATE TYPE known.span AS RANGE (subtype = timestamptz, multirange_type_name = known.spans);
"#;

/// Those types with values.
#[rustfmt::skip] // One line or two a type.
pub(super) const KNOWN: &[Tried] = &[
    ("known.mood", &["'b,c'"]),
    ("known.moods", &[r#"'{sad,"b,c",NULL}'"#]),
    ("known.pair", &["ROW(1, 'x, y', '{a,\"b c\",NULL}')", r#"ROW(NULL, E'a"\\b', '{}')"#, "ROW(NULL, NULL, NULL)"]),
    ("known.far_pair", &["ROW(11, '', NULL)"]),
    ("known.pair[]", &[r#"ARRAY[ROW(1, 'a', '{"\""}'), ROW(2, '"(b', NULL), NULL]::known.pair[]"#]),
    ("known.pairs", &["ARRAY[ROW(1, 'a,b', '{}')]::known.pair[]", "'{}'"]),
    ("known.pairs[]", &[r#"'{"{}",NULL,"{\"(1,ab,{})\"}"}'"#]),
    ("known.nest", &[
        "ROW(ROW(1, 'a', '{}'), 'b,c', '{}', '0044-03-15 12:00:00.5+00 BC', '[2024-01-01 00:00+00,)')",
        "ROW(NULL, NULL, NULL, 'infinity', 'empty')",
    ]),
    ("known.span", &["'[2024-01-01 00:00+00,infinity)'", "'empty'", "'(,)'"]),
    ("known.spans", &["'{[2024-01-01 00:00+00,2024-01-02 00:00+00),[2025-01-01 00:00+00,)}'", "'{}'"]),
];

/// Types of extensions that Postgres brings along, each with its extension.
#[rustfmt::skip] // One line or two a type.
pub(super) const EXTENSIONS: &[(&str, Tried)] = &[
    ("citext", ("public.citext", &["'AbC'", "''", "'NULL'", r#"E'"\n'"#])),
    ("citext", ("public.citext[]", &[r#"ARRAY['A,b', NULL, 'NULL', '"']::public.citext[]"#])),
    ("hstore", ("public.hstore", &["''", r#"'a=>1, "b c"=>NULL, d=>"NULL"'"#,
        r#"public.hstore(ARRAY['q"', E'\\', '=>', ''], ARRAY['"', E'\\\\', ',', ''])"#])),
    ("hstore", ("public.hstore[]", &[r#"ARRAY['a=>"b,c"'::public.hstore, '', NULL]"#])),
];
