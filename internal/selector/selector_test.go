package selector_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/renewd/renewd/internal/selector"
)

func TestCheck(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		node           bool
		selector, want string // want is part of the problem; "": there is none
	}{
		{false, "unix:uid:1000", ""},
		{false, "unix:uid:abc", "is not a number"},
		{false, "unix:uid:-1", "is not a number"},
		{false, "unix:gid:007", "is not a number"},
		{false, "unix:supplementary_gid:4294967296", "is not a number"},
		{false, "unix:usr:web", "did you mean unix:user?"},
		{false, "unix:User:web", "did you mean unix:user?"},
		{false, "unix:exe:/bin/true", "after unix: comes uid, user, gid, "},
		{false, "unix:uid", "write unix:uid:VALUE"},
		{false, "unix:user:", "has no value"},
		{false, "unix:path:bin/true", "is not an absolute path"},
		{false, "unix:path:/usr//bin/true", "write /usr/bin/true"},
		{false, "unix:path:/usr/bin/true", ""},
		{false, "unix:sha256:" + strings.Repeat("a", 64), ""},
		{false, "unix:sha256:" + strings.Repeat("A", 64), "lower case"},
		{false, "unix:sha256:abc", "has 3 characters: give the 64 hex digits"},
		{false, "uid:1000", "did you mean unix:uid?"},
		{false, "unx:uid:1000", "did you mean unix:uid?"},
		{false, "aws_iid:tag:x", "there are those of unix, systemd, docker, "},
		{false, "systemd:id:web", "write it as web.service"},
		{false, "systemd:id:web.service", ""},
		{false, "systemd:fragment_path:", ""},
		{false, "systemd:fragment_path:etc/x", "is not an absolute path"},
		{false, "docker:label:a:b", ""},
		{false, "docker:label:a:", ""},
		{false, "docker:label:a", "is not KEY:VALUE"},
		{false, "docker:image:x", "did you mean docker:image_id?"},
		{false, "k8s:pod-label:app:web", ""},
		{false, "k8s:pod-label:app", "is not KEY:VALUE"},
		{false, "k8s:namespace:web", "after k8s: comes ns, sa, "},
		{false, "k8s:pod-image:", ""},
		{false, "k8s:pod-image-count:two", "is not a number"},
		{false, "spiffe_id:spiffe://example.org/spire/agent/join_token/T", ""},
		{false, "spiffe_id:x", "is not a SPIFFE ID"},
		{false, "k8s_psat:cluster:one", "name the alias in parent_id"},
		{true, "k8s_psat:cluster:one", ""},
		{true, "k8s_psat:agent_node_label:zone", "is not KEY:VALUE"},
		{true, "k8s_sat:cluster:one", "did you mean k8s_psat:cluster?"},
		{true, "x509pop:subject:cn:node", ""},
		{true, "x509pop:ca:fingerprint:" + strings.Repeat("0", 40), ""},
		{true, "x509pop:ca:fingerprint:" + strings.Repeat("0:", 20), "is not in hex"},
		{true, "x509pop:serialnumber:0a", ""},
		{true, "x509pop:san:role:db", ""},
		{true, "unix:uid:1", "an alias needs those of nodes"},
	} {
		kind, value, _ := strings.Cut(tt.selector, ":")
		if got := selector.Check(tt.node, kind, value); (got == "") != (tt.want == "") || !strings.Contains(got, tt.want) {
			t.Errorf("%s: %q, want %q", tt.selector, got, tt.want)
		}
	}
}

func TestWarnings(t *testing.T) {
	t.Parallel()
	var entries []selector.Entry
	for i := range 30 {
		entries = append(entries, selector.Entry{Name: fmt.Sprint("e", i), Selectors: []string{"unix:usr:web", fmt.Sprintf("unix:uid:x%02d", i), "unix:uid:1"}})
	}
	got := selector.Warnings(slices.Values(entries))
	if len(got) != 21 || got[0] != `selector "unix:uid:x00" of "e0" never matches: "x00" is not a number from 0 to 4294967295: write the digits without sign and leading zeros` ||
		got[20] != "and 11 more selectors never match" {
		t.Errorf("%d: %s", len(got), strings.Join(got, "\n"))
	}
	got = selector.Warnings(slices.Values([]selector.Entry{
		{Name: "b", Selectors: []string{"unix:usr:web", "unix:usr:web"}}, {Name: "a", Selectors: []string{"unix:usr:db"}}, {Name: "c", Alias: true, Selectors: []string{"k8s_psat:cluster:x"}},
	}))
	if want := `selector "unix:usr:…" of "a", "b" never matches: no attestor gives it: did you mean unix:user?`; len(got) != 1 || got[0] != want {
		t.Errorf("got  %q\nwant %s", got, want)
	}
}

// FuzzCheck: no selector causes a panic, and every problem has words.
func FuzzCheck(f *testing.F) {
	f.Add(false, "unix", "uid:1")
	f.Add(true, "x509pop", "subject:cn:")
	f.Fuzz(func(t *testing.T, node bool, kind, value string) {
		if problem := selector.Check(node, kind, value); problem != "" && len(problem) < 10 {
			t.Errorf("%q", problem)
		}
	})
}
