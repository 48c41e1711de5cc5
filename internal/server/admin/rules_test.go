package admin_test

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/renewd/renewd/internal/server/admin"
)

// TestParseRules: the error for a wrong rule names its position and the remedy.
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
		_, err := admin.ParseRules(td, []string{"unix:uid:0", rule}, nil)
		if err == nil || !strings.HasPrefix(err.Error(), "operators.managers[1]: "+want) {
			t.Errorf("got %v\nwant %s", err, want)
		}
		_, err = admin.ParseRules(td, nil, []string{rule})
		if err == nil || !strings.HasPrefix(err.Error(), "operators.readers[0]: "+want) {
			t.Errorf("got %v\nwant %s", err, want)
		}
	}
	_, err := admin.ParseRules(td, []string{"x", boss.String(), "y"}, []string{"z"})
	if err == nil || strings.Count(err.Error(), "\n") != 2 {
		t.Errorf("three wrong rules: %v", err)
	}
}

// TestUserNamespace: in a user namespace without all IDs, the overflow ID stands for every
// user or group that is not mapped. A rule cannot name it.
func TestUserNamespace(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		inside int // the only user and group in the namespace
		rule   string
		want   string // begins so
	}{
		{0, "unix:uid:0", "<nil>"},
		{0, "unix:gid:65533", "<nil>"},
		{0, "unix:uid:65534", `operators.managers[0]: "unix:uid:65534" is the overflow ID, which stands for all users or groups outside this user namespace: `},
		{0, "unix:gid:65534", `operators.managers[0]: "unix:gid:65534" is the overflow ID, which stands for all users or groups outside this user namespace: `},
		{65534, "", "manager: false"},
		{65533, "", "manager: true"},
	} {
		// A link, because other users cannot read the directory of the test binary.
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), "RENEWD_TEST_RULE="+tt.rule, "GORACE=atexit_sleep_ms=0")
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Cloneflags:  syscall.CLONE_NEWUSER,
			UidMappings: []syscall.SysProcIDMap{{ContainerID: tt.inside, HostID: os.Geteuid(), Size: 1}},
			GidMappings: []syscall.SysProcIDMap{{ContainerID: tt.inside, HostID: os.Getegid(), Size: 1}},
		}
		out, err := cmd.CombinedOutput()
		if err != nil && len(out) == 0 {
			t.Skipf("no user namespace here: %v", err)
		}
		if !strings.HasPrefix(string(out), tt.want) {
			t.Errorf("%q as user %d: %s%v, want %s", tt.rule, tt.inside, out, err, tt.want)
		}
	}
	if _, err := admin.ParseRules(td, []string{"unix:uid:65534", "unix:gid:65534"}, nil); err != nil {
		t.Errorf("all users are mapped: %v", err)
	}
}

// tryRule prints the result of a rule or, without one, whether this process's user is a
// manager.
func tryRule(rule string) {
	if rule != "" {
		_, err := admin.ParseRules(td, []string{rule}, nil)
		fmt.Println(err)
		return
	}
	rules, err := admin.ParseRules(td, nil, nil)
	if err != nil {
		panic(err)
	}
	fmt.Println("manager:", admin.ManagesAs(rules, uint32(os.Geteuid())))
}
