package config_test

import (
	"strings"
	"testing"

	"github.com/renewd/renewd/internal/config"
)

func TestUnknownVariables(t *testing.T) {
	t.Parallel()
	s := schema
	s.Others = []string{"X_OTHER_", "X_SOCKET"}
	environ := []string{
		"PATH=/bin", "X_NAME=n", "X_TEAM_MANAGERS=a", // known
		"X_WAT=s3cr3t", "X_MANAGERS=s3cr3t", "X_NOTHING_LIKE_IT=s3cr3t",
		"X_UNSET=", "X_OTHER_THING=1", "X_SOCKET=1", // of other programs
		// Of Kubernetes.
		"X_SERVICE_HOST=10.0.0.1", "X_SERVICE_PORT=8081", "X_SERVICE_PORT_GRPC=8081", "X_PORT=tcp://10.0.0.1:8081",
		"X_WEB_PORT_8081_TCP=tcp://10.0.0.1:8081", "X_WEB_PORT_8081_TCP_ADDR=10.0.0.1", "X_WEB_PORT_8081_TCP_PORT=8081", "X_WEB_PORT_8081_TCP_PROTO=tcp",
		"X_DOOR_PORT=8081",
	}
	const want = `X_DOOR_PORT: is not the variable of a field; unset it; "x help config" lists the variables
X_MANAGERS: is not the variable of a field; did you mean X_TEAM_MANAGERS?
X_NOTHING_LIKE_IT: is not the variable of a field; unset it; "x help config" lists the variables
X_WAT: is not the variable of a field; did you mean X_WAIT?`
	if got := strings.Join(config.Lines(s.UnknownVariables(environ)), "\n"); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}
