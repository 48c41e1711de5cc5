package operator_test

import (
	"strings"
	"testing"

	"github.com/renewd/renewd/internal/operator"
)

// TestParseRules: each wrong rule is named with its place and what to do.
func TestParseRules(t *testing.T) {
	t.Parallel()
	const forms = "is no rule: write unix:uid:N, unix:user:NAME, unix:gid:N, unix:group:NAME or a SPIFFE ID"
	for rule, want := range map[string]string{
		"":                              `"" ` + forms,
		"root":                          `"root" ` + forms,
		"uid:0":                         `"uid:0" ` + forms,
		"unix:uid":                      `"unix:uid" ` + forms,
		"unix:uid:":                     `"unix:uid:" ` + forms,
		"unix:path:/bin/sh":             `"unix:path:/bin/sh" ` + forms,
		"unix:uid:root":                 `"unix:uid:root" has no number that could be an ID`,
		"unix:uid:-1":                   `"unix:uid:-1" has no number that could be an ID`,
		"unix:uid:0x0":                  `"unix:uid:0x0" has no number that could be an ID`,
		"unix:uid: 0":                   `"unix:uid: 0" has no number that could be an ID`,
		"unix:gid:4294967296":           `"unix:gid:4294967296" has no number that could be an ID`,
		"unix:user:no-such-user":        `"unix:user:no-such-user" names a user that this machine does not have: `,
		"unix:group:no-such-group":      `"unix:group:no-such-group" names a group that this machine does not have: `,
		"spiffe://example.org":          `"spiffe://example.org" has no path: name one operator's ID`,
		"spiffe://example.com/ops":      `"spiffe://example.com/ops" is not of trust domain example.org: operators need an SVID of it`,
		"spiffe://example.org/*":        `"spiffe://example.org/*" is not a SPIFFE ID: `,
		"spiffe://example.org/ops/":     `"spiffe://example.org/ops/" is not a SPIFFE ID: `,
		"SPIFFE://example.org/ops/boss": `"SPIFFE://example.org/ops/boss" ` + forms,
	} {
		_, err := operator.ParseRules(td, []string{"unix:uid:0", rule}, nil)
		if err == nil || !strings.HasPrefix(err.Error(), "operators.managers[1]: "+want) {
			t.Errorf("got %v\nwant %s", err, want)
		}
		_, err = operator.ParseRules(td, nil, []string{rule})
		if err == nil || !strings.HasPrefix(err.Error(), "operators.readers[0]: "+want) {
			t.Errorf("got %v\nwant %s", err, want)
		}
	}
	_, err := operator.ParseRules(td, []string{"x", boss.String(), "y"}, []string{"z"})
	if err == nil || strings.Count(err.Error(), "\n") != 2 {
		t.Errorf("three wrong rules: %v", err)
	}
}
