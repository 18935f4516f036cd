//! Types and the values that they are tried with.

/// Types that the source has of its own.
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
    CREATE TYPE pair AS (a int, b text);
    CREATE DOMAIN far_pair AS pair CHECK ((VALUE).a > 10);
    CREATE FUNCTION is_even(n int) RETURNS boolean IMMUTABLE LANGUAGE sql AS 'SELECT n % 2 = 0';
    CREATE DOMAIN even AS int CHECK (is_even(VALUE));
"#;

/// A column's type and the values that it is tried with, as literals. NULL is tried everywhere.
pub(super) const BUILT_IN: &[(&str, &[&str])] = &[
    ("boolean", &["true", "false"]),
    ("smallint", &["-32768", "32767", "0"]),
    ("integer", &["-2147483648", "2147483647"]),
    (
        "bigint",
        &[
            "-9223372036854775808",
            "9223372036854775807",
            "9007199254740993",
        ],
    ),
    (
        "real",
        &[
            "'NaN'",
            "'Infinity'",
            "'-Infinity'",
            "'-0'",
            "1e-37",
            "3.4028235e38",
            "0.1",
            "1e-45",
        ],
    ),
    (
        "double precision",
        &[
            "'NaN'",
            "'Infinity'",
            "'-Infinity'",
            "'-0'",
            "1e-300",
            "1.7976931348623157e308",
            "0.1",
            "5e-324",
            "1e22",
            "123456789.123456789",
        ],
    ),
    (
        "numeric",
        &[
            "'NaN'",
            "'Infinity'",
            "'-Infinity'",
            "0",
            "0.000",
            "-1.50",
            "1e-100",
            "1e100",
            "1234567890123456789012345678901234567890123456789012345678901234567890.123456789012345678901234567890",
        ],
    ),
    ("numeric(12,4)", &["99999999.9999", "-0.0001", "'NaN'"]),
    (
        "money",
        &["-92233720368547758.08", "92233720368547758.07", "1234.5"],
    ),
    ("character(5)", &["''", "'ab'", "'äöüß€'", "'abc  '"]),
    ("character", &["'x'"]),
    ("character varying(6)", &["''", "'  ab  '", "'日本語字'"]),
    ("character varying", &["'no limit'"]),
    (
        "text",
        &[
            "''",
            "' '",
            "E'\\\\N'",
            "'null'",
            "'NULL'",
            "'O''Brien said \"hi\"'",
            "E'a\\nb\\r\\nc\\td\\\\e'",
            "E'\\001\\002\\037\\177'",
            "'日本語 🎉 ñ e\u{301} \u{2028}'",
            "'{\"a\": [1, 2]}'",
            "'\\x00'",
            "E'\\\\.'",
            "repeat('long ', 20000)",
        ],
    ),
    (
        "bytea",
        &[
            "''",
            "'\\x00ff0a5c27'",
            "decode(repeat('00deadbeef', 3000), 'hex')",
        ],
    ),
    (
        "date",
        &[
            "'infinity'",
            "'-infinity'",
            "'4713-01-01 BC'",
            "'0044-03-15 BC'",
            "'5874897-12-31'",
            "'2024-02-29'",
        ],
    ),
    (
        "time without time zone",
        &["'00:00'", "'24:00'", "'23:59:59.999999'"],
    ),
    ("time(2) without time zone", &["'12:34:56.789'"]),
    (
        "time with time zone",
        &["'00:00+15:59'", "'24:00-15:59'", "'12:00:00.000001+05:30'"],
    ),
    (
        "timestamp without time zone",
        &[
            "'infinity'",
            "'-infinity'",
            "'4713-11-24 00:00:00 BC'",
            "'294276-12-31 23:59:59.999999'",
            "'2024-02-29 12:00:00.1'",
        ],
    ),
    (
        "timestamp(0) without time zone",
        &["'2024-02-29 12:00:00.6'"],
    ),
    (
        "timestamp with time zone",
        &[
            "'infinity'",
            "'-infinity'",
            "'4713-11-24 00:00:00+00 BC'",
            "'294276-12-31 23:59:59.999999+00'",
            "'2024-03-31 02:30:00+02'",
        ],
    ),
    (
        "interval",
        &[
            "'0'",
            "'178000000 years'",
            "'-178000000 years'",
            "'1 mon -1 day 00:00:00.000001'",
            "'-1 year 2 mons 3 days'",
            "'-23:59:59.999999'",
        ],
    ),
    ("interval day to second(3)", &["'1 day 02:03:04.5678'"]),
    (
        "uuid",
        &[
            "'00000000-0000-0000-0000-000000000000'",
            "'ffffffff-ffff-ffff-ffff-ffffffffffff'",
        ],
    ),
    (
        "json",
        &[
            "'null'",
            "'{\"a\":1,  \"a\":2}'",
            "E'{\\n  \"x\": [1.0, 1e5, true]\\n}'",
            "'\"text\"'",
            "'12345678901234567890.10'",
            "'\"\\u00e9\\ud83c\\udf89\"'",
        ],
    ),
    (
        "jsonb",
        &[
            "'null'",
            "'{\"b\":1,\"a\":{\"c\":[]}}'",
            "'\"null\"'",
            "'1.10'",
            "'[]'",
            "'\"\\\\ \\\" \\n\"'",
        ],
    ),
    ("jsonpath", &["'$.a[*] ? (@ > 1)'"]),
    (
        "inet",
        &[
            "'192.168.0.1/24'",
            "'10.0.0.1'",
            "'::1'",
            "'2001:db8::ff/64'",
        ],
    ),
    ("cidr", &["'10.0.0.0/8'", "'2001:db8::/32'"]),
    ("macaddr", &["'08:00:2b:01:02:03'"]),
    ("macaddr8", &["'08:00:2b:01:02:03:04:05'"]),
    ("bit(3)", &["B'101'"]),
    ("bit varying", &["B''", "B'10101010101'"]),
    ("bit varying(4)", &["B'11'"]),
    (
        "tsvector",
        &["''", "'''it''''s'':1A fat:2B,4C cat:5'", "'a b'"],
    ),
    ("tsquery", &["'fat & (rat | !cat:AB)'", "'a <-> b'"]),
    ("xml", &["'<a b=\"c\">d &amp; e</a>'", "'<x/>'"]),
    (
        "point",
        &["'(1.5,-2)'", "'(NaN,Infinity)'", "'(-0,1e-300)'"],
    ),
    ("line", &["'{1,2,3}'"]),
    ("lseg", &["'[(0,0),(1,1)]'"]),
    ("box", &["'(1,1),(0,0)'"]),
    ("path", &["'[(0,0),(1,1)]'", "'((0,0),(1,1),(2,0))'"]),
    ("polygon", &["'((0,0),(1,1),(2,0))'"]),
    ("circle", &["'<(1,2),3.3>'"]),
    ("pg_lsn", &["'FFFFFFFF/FFFFFFFF'", "'0/0'"]),
    ("oid", &["4294967295", "0"]),
    ("xid", &["'4294967295'"]),
    ("xid8", &["'18446744073709551615'"]),
    ("tid", &["'(4294967295,65535)'"]),
    ("\"char\"", &["'x'", "''", "'\\'", "'\"'"]),
    ("name", &["'a name'", "''"]),
    ("regclass", &["'pg_catalog.pg_class'"]),
    ("regtype", &["'timestamp with time zone'"]),
    ("pg_snapshot", &["'10:20:10,14,15'"]),
    ("int4range", &["'empty'", "'[1,10)'", "'(,5]'", "'(,)'"]),
    (
        "int8range",
        &["'[-9223372036854775808,9223372036854775807)'"],
    ),
    ("numrange", &["'[1.10,2.200]'", "'empty'"]),
    ("daterange", &["'[2024-01-01,infinity)'"]),
    ("tsrange", &["'[2024-01-01 00:00,2024-01-02 00:00)'"]),
    (
        "tstzrange",
        &["'[2024-01-01 00:00+00,)'", "'(-infinity,infinity)'"],
    ),
    ("int4multirange", &["'{}'", "'{[1,3),[5,7)}'"]),
    ("nummultirange", &["'{[1.5,2.5],(7,)}'"]),
    (
        "tstzmultirange",
        &["'{[2024-01-01 00:00+00,2024-01-02 00:00+00)}'"],
    ),
    ("boolean[]", &["'{}'", "'{t,f,NULL}'"]),
    ("smallint[]", &["'{-32768,NULL,32767}'"]),
    (
        "integer[]",
        &[
            "'{}'",
            "'{1,NULL,-3}'",
            "'{{1,2},{3,NULL}}'",
            "'[0:2]={1,2,3}'",
            "'[-1:0][2:3]={{1,2},{3,4}}'",
        ],
    ),
    ("bigint[]", &["'{9223372036854775807,9007199254740993}'"]),
    ("real[]", &["'{NaN,-0,1e-37,NULL}'"]),
    (
        "double precision[]",
        &["'{NaN,Infinity,-Infinity,-0,1e-300,0.1}'", "'{}'"],
    ),
    ("numeric[]", &["'{1.0,1.00,NaN,NULL,1e-50}'"]),
    ("numeric(10,2)[]", &["'{1.05,99999999.99}'"]),
    ("money[]", &["'{1234.50,-5}'::numeric[]::money[]"]),
    (
        "text[]",
        &[
            "'{}'",
            "'{\"\"}'",
            "'{NULL,\"NULL\",null,\"null\"}'",
            "ARRAY['a,b', 'c\"d', 'e\\f', '{g}', ' h ', E'i\\nj', 'é🎉']",
            "'{{a,b},{c,\"d,e\"}}'",
            "'[5:6]={x,y}'",
            "ARRAY[repeat('x', 9000), NULL]",
        ],
    ),
    ("character(3)[]", &["'{a,bc,\"d  \"}'"]),
    ("character varying(5)[]", &["'{abc,\"\"}'"]),
    ("bytea[]", &["ARRAY['\\x00ff'::bytea, '', NULL]"]),
    ("date[]", &["'{infinity,2024-01-01,\"0044-03-15 BC\"}'"]),
    ("time without time zone[]", &["'{24:00,00:00:00.000001}'"]),
    ("time with time zone[]", &["'{12:00+05:30}'"]),
    (
        "timestamp without time zone[]",
        &["'{2024-01-01 12:00:00.5,infinity}'"],
    ),
    (
        "timestamp with time zone[]",
        &["'{\"2024-01-01 12:00:00.5+00\",-infinity,NULL}'"],
    ),
    ("interval[]", &["'{\"1 mon -1 days\",00:00:01}'"]),
    ("uuid[]", &["'{00000000-0000-0000-0000-000000000001}'"]),
    ("json[]", &["ARRAY['null'::json, '{\"a\": \"b,c\"}', NULL]"]),
    ("jsonb[]", &["ARRAY['null'::jsonb, '[1, \"x\"]', NULL]"]),
    ("inet[]", &["'{10.0.0.1/8,::1}'"]),
    ("cidr[]", &["'{10.0.0.0/8}'"]),
    ("macaddr[]", &["'{08:00:2b:01:02:03}'"]),
    ("macaddr8[]", &["'{08:00:2b:01:02:03:04:05}'"]),
    ("bit(2)[]", &["'{10,01}'"]),
    ("bit varying[]", &["'{1,\"\",101}'"]),
    ("tsvector[]", &["ARRAY['a:1 b'::tsvector]"]),
    ("xml[]", &["ARRAY['<a>,</a>'::xml]"]),
    ("point[]", &["'{\"(1,2)\",\"(3,4)\"}'"]),
    ("box[]", &["'{(1,1),(0,0);(2,2),(1,1)}'", "'{}'"]),
    ("pg_lsn[]", &["'{0/1}'"]),
    ("oid[]", &["'{4294967295}'"]),
    ("\"char\"[]", &["'{a,\"\"}'"]),
    ("name[]", &["'{abc}'"]),
    ("int4range[]", &["'{\"[1,3)\",empty}'"]),
    (
        "tstzrange[]",
        &["ARRAY['[2024-01-01 00:00+00,)'::tstzrange]"],
    ),
    ("int4multirange[]", &["ARRAY['{[1,3)}'::int4multirange]"]),
];

/// The source's own types, with values.
pub(super) const OWN: &[(&str, &[&str])] = &[
    ("public.moods", &["'{sad,\"it''s ok\"}'"]),
    ("public.far_pair", &["ROW(11, 'x')"]),
    ("public.even", &["2"]),
    (
        "public.mood",
        &["'sad'", "'it''s ok'", "'very \"happy\"'", "''"],
    ),
    (
        "public.mood[]",
        &[
            "'{}'",
            "ARRAY['it''s ok', 'very \"happy\"', '', NULL]::public.mood[]",
        ],
    ),
    (
        "\"My Types\".\"Colour\"",
        &["'green, blue'", "'{}'", "'NULL'"],
    ),
    (
        "\"My Types\".\"Colour\"[]",
        &["'{\"green, blue\",\"NULL\",NULL,\"{}\"}'"],
    ),
    ("public.positive", &["1", "999"]),
    ("public.positive[]", &["'{1,2,NULL}'"]),
    ("public.tiny", &["9"]),
    ("public.good_mood", &["'it''s ok'"]),
    ("public.numbers", &["'{1,NULL,3}'"]),
    (
        "public.pair",
        &[
            "ROW(1, 'x, y')",
            "ROW(NULL, E'a\"\\\\b')",
            "ROW(NULL, NULL)",
        ],
    ),
    (
        "public.pair[]",
        &["ARRAY[ROW(1, 'a'), ROW(2, '\"(b')]::public.pair[]"],
    ),
];
