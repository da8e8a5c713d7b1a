package kmsim

import (
	"fmt"
	"html"
	"net/http"
	"net/url"
	"time"
)

// isIdentityPath tells whether a call is to a service that gives out credentials: AWS's STS,
// whose calls are forms sent to /.
func isIdentityPath(r *http.Request) bool {
	return r.URL.Path == "/" && r.Method == http.MethodPost
}

// stsLife is how long an assumed role's credentials hold.
const stsLife = time.Hour

// answerSTS speaks the one call of AWS's STS that there is a use for here.
func (s *Sim) answerSTS(r *request) answer {
	form, err := url.ParseQuery(string(r.body))
	role := form.Get("RoleArn")
	r.entry = Entry{Protocol: AWS, Op: form.Get("Action"), Key: role, Principal: s.nameOf(accessKey(r.Header.Get("Authorization")))}
	header := map[string]string{"Content-Type": "text/xml", "X-Amzn-Requestid": r.id}
	switch {
	case err != nil || form.Get("Action") != "AssumeRole" || role == "":
		return answer{status: http.StatusBadRequest, code: "InvalidAction", header: header, body: stsError("InvalidAction", r.id)}
	case r.fault == BadIdentity:
		return answer{status: http.StatusForbidden, code: "AccessDenied", header: header, body: stsError("AccessDenied", r.id)}
	}
	id := s.giveCredential("ASIA", role+"/"+form.Get("RoleSessionName"))
	const ns = "https://sts.amazonaws.com/doc/2011-06-15/"
	return answer{header: header, body: fmt.Sprintf(`<AssumeRoleResponse xmlns="%s"><AssumeRoleResult>`+
		`<AssumedRoleUser><AssumedRoleId>AROA:holdfast</AssumedRoleId><Arn>%s</Arn></AssumedRoleUser>`+
		`<Credentials><AccessKeyId>%s</AccessKeyId><SecretAccessKey>simulated</SecretAccessKey><SessionToken>simulated</SessionToken><Expiration>%s</Expiration></Credentials>`+
		`</AssumeRoleResult><ResponseMetadata><RequestId>%s</RequestId></ResponseMetadata></AssumeRoleResponse>`,
		ns, html.EscapeString(role), id, time.Now().Add(stsLife).UTC().Format(time.RFC3339), r.id)}
}

func stsError(code, id string) string {
	return fmt.Sprintf(`<ErrorResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><Error><Type>Sender</Type><Code>%s</Code><Message>not authorized</Message></Error><RequestId>%s</RequestId></ErrorResponse>`, code, id)
}
