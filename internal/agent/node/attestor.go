package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
)

// Attestor is one way to attest the node. One goroutine at a time calls its methods.
type Attestor interface {
	// Type returns the name of the server's node attestor.
	Type() string
	// Payload returns the first message to the server. It is called for each
	// attempt, to find a replaced credential, and must not use the credential up.
	// It fails with [ErrNoCredential] when none is configured.
	Payload(ctx context.Context) ([]byte, error)
	// Respond answers one challenge of the server.
	Respond(ctx context.Context, challenge []byte) ([]byte, error)
}

// ErrNoCredential means that the configuration has no credential to attest the node
// with, so that another attempt is useless.
var ErrNoCredential = errors.New("no credential is configured to attest the node with")

// maxToken is the longest token accepted, in bytes. A server's has 36.
const maxToken = 4 << 10

type joinToken struct{ value, file string }

// JoinToken attests a node with a token that the server has issued for it and
// accepts once. The token is value or, when that is empty, the content of file
// without surrounding white space.
func JoinToken(value, file string) Attestor { return joinToken{strings.TrimSpace(value), file} }

func (joinToken) Type() string { return "join_token" }

func (j joinToken) Payload(context.Context) ([]byte, error) {
	if j.value != "" {
		return []byte(j.value), nil
	}
	if j.file == "" {
		return nil, fmt.Errorf("%w: set join_token or join_token_file to a token that the server issued for this node", ErrNoCredential)
	}
	f, err := os.Open(j.file)
	if err != nil {
		return nil, fmt.Errorf("read join_token_file: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxToken+1))
	if err != nil {
		return nil, fmt.Errorf("read join_token_file: %w", err)
	}
	token := strings.TrimSpace(string(b))
	switch {
	case len(b) > maxToken:
		return nil, fmt.Errorf("join_token_file %s is larger than %d bytes: it must hold one token and nothing else", j.file, maxToken)
	case token == "":
		return nil, fmt.Errorf("join_token_file %s is empty: put a token into it that the server issued for this node; a systemd credential is read when the service starts, so restart it then", j.file)
	case strings.ContainsAny(token, " \t\r\n"):
		return nil, fmt.Errorf("join_token_file %s holds more than one word: it must hold one token and nothing else", j.file)
	}
	return []byte(token), nil
}

func (joinToken) Respond(context.Context, []byte) ([]byte, error) {
	return nil, errors.New("the server sent a challenge, join_token has none")
}
