package compute

import (
	"fmt"
	"os/user"
)

// agentUser is the name by which Postgres knows this process on the private socket.
func agentUser() (string, error) {
	u, err := user.Current()
	if err != nil {
		return "", fmt.Errorf("this process's user: %w", err)
	}
	return u.Username, nil
}
