package boot

import (
	"regexp"
	"slices"
	"strings"
)

// ResetAll among names to reset stands for all of them, as in ALTER SYSTEM RESET ALL.
const ResetAll = "all"

// ResetSettings takes settings out of what ALTER SYSTEM wrote. ResetAll takes all out, lines
// included that are none of its: with those, too, Postgres may not start.
func ResetSettings(auto []byte, names []string) []byte {
	named := func(name string) bool {
		return slices.ContainsFunc(names, func(n string) bool { return strings.EqualFold(n, name) })
	}
	if named(ResetAll) {
		return nil
	}
	var kept []byte
	for line := range strings.Lines(string(auto)) {
		if name, _, ok := parseSetting(line); !ok || !named(name) {
			kept = append(kept, line...)
		}
	}
	return kept
}

// parseSetting reads a line as ALTER SYSTEM writes it: name = 'value'.
func parseSetting(line string) (name, value string, ok bool) {
	name, value, ok = strings.Cut(strings.TrimSpace(line), "=")
	name = strings.TrimSpace(name)
	value = strings.Trim(strings.TrimSpace(value), "'")
	return name, value, ok && settingName.MatchString(name)
}

// A Suspect is a setting of ALTER SYSTEM that may keep Postgres from starting.
type Suspect struct {
	Name string
	// Named tells that Postgres named it, or a part of its value, before it ended.
	Named bool
}

// signs is what Postgres says of settings that it does not name.
var signs = map[string][]string{
	"ssl":           {"server certificate file", "private key file"},
	"ssl_cert_file": {"server certificate file"},
	"ssl_key_file":  {"private key file"},
	"huge_pages":    {"could not map anonymous shared memory", "huge pages not supported"},
	// All of these make shared memory larger.
	"shared_buffers":            {"could not map anonymous shared memory"},
	"wal_buffers":               {"could not map anonymous shared memory"},
	"max_connections":           {"could not map anonymous shared memory", "could not create semaphores"},
	"max_locks_per_transaction": {"could not map anonymous shared memory"},
	"max_prepared_transactions": {"could not map anonymous shared memory"},
}

// Suspects lists the settings that ALTER SYSTEM made; if Postgres named some of them in what
// it said before it ended, only those.
func Suspects(auto []byte, said string) []Suspect {
	var all []Suspect
	for line := range strings.Lines(string(auto)) {
		if name, value, ok := parseSetting(line); ok {
			named := slices.ContainsFunc(signs[strings.ToLower(name)], func(sign string) bool { return strings.Contains(said, sign) })
			// A list whose quotes are wrong is one name to Postgres.
			named = named || mentions(said, name) || slices.ContainsFunc(append(strings.Split(value, ","), value), func(part string) bool {
				part = strings.Trim(part, ` "'`)
				return len(part) > 2 && strings.Contains(said, `"`+part+`"`)
			})
			all = append(all, Suspect{name, named})
		}
	}
	if named := slices.DeleteFunc(slices.Clone(all), func(s Suspect) bool { return !s.Named }); len(named) > 0 {
		return named
	}
	return all
}

func mentions(said, name string) bool {
	return regexp.MustCompile(`(?i)(^|[^a-z0-9_])` + regexp.QuoteMeta(name) + `($|[^a-z0-9_])`).MatchString(said)
}
